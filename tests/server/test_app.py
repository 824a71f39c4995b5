"""The server: same answers as the library, every wrong request named, limits, tokens, hosts, a clean end."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from drawing import draw_folders
from terminal import topwork
from topwork.commands.fit import fit
from topwork.errors import TopworkError, UsageError
from topwork.export.batch import row_of
from topwork.export.predictor import Predictor
from topwork.server.app import Service, create_app, named_models
from topwork.server.web import SHUTDOWN_SECONDS, open_socket
from topwork.settings import FitSettings, ServeSettings

from .serving import form, read_all, serving, wait_until

ENVELOPE = {400, 401, 404, 405, 408, 411, 413, 415, 421, 422, 503, 504}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    data = draw_folders(root / "data", n_each=12, shapes=("disc", "square", "cross"))
    fit(data, root / "run", FitSettings(backbone="random:test_efficientnet", near_duplicates=False))
    return root / "run"


@pytest.fixture(scope="session")
def photos(model):
    return sorted((model.parent / "data").glob("*/*.jpg"))


@pytest.fixture(scope="module")
def server(model):
    options = {"body_seconds": 2, "max_images": 8, "max_body_mb": 1, "allow_host": "model.example"}
    with serving(model, f"other={model}", **options) as served:
        yield served
        assert served.end() == 0


# ---- answers


def test_served_in_one_request_in_many_and_from_the_library_are_equal(server, model, photos):
    expected = [json.loads(json.dumps(row_of(p))) for p in Predictor(model).predict(photos)]
    for start in range(0, len(photos), 8):
        some = photos[start : start + 8]
        body, headers = form(*[(str(path), path.read_bytes()) for path in some])
        status, answer, _ = server.ask("POST", "/predict", body, headers)
        assert status == 200
        assert answer["predictions"] == expected[start : start + 8]
    answers: dict[int, object] = {}

    def ask(number: int) -> None:
        answers[number] = server.ask("POST", "/predict/other", photos[number].read_bytes())[1]["predictions"][0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(photos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[n] for n in range(len(photos))] == [row | {"path": "image"} for row in expected]


def test_one_bad_item_does_not_spoil_the_others(server, photos):
    body, headers = form(("a.jpg", photos[0].read_bytes()), ("b", b"no image"), ("", photos[1].read_bytes()))
    status, answer, _ = server.ask("POST", "/predict?top=1", body, headers)
    assert status == 200
    assert [row["outcome"] == "error" for row in answer["predictions"]] == [False, True, False]
    assert "not an image" in answer["predictions"][1]["error"]
    assert len(answer["predictions"][0]["top"]) == 1


def test_where_the_model_looked_comes_as_a_picture(server, photos):
    status, answer, _ = server.ask("POST", "/predict?explain=true", photos[0].read_bytes())
    assert status == 200
    assert answer["predictions"][0]["map"].startswith("data:image/jpeg;base64,/9j/")


def test_the_other_addresses_answer(server):
    assert server.ask("GET", "/live")[:2] == (200, {"status": "live"})
    assert server.ask("GET", "/ready")[:2] == (200, {"status": "ready"})
    names = [model["name"] for model in server.ask("GET", "/models")[1]["models"]]
    assert names == ["run", "other"]
    assert "/predict/{model}" in server.ask("GET", "/openapi.json")[1]["paths"]
    assert "curl" in server.ask("GET", "/docs")[1]
    metrics = server.ask("GET", "/metrics")[1]
    assert 'topwork_responses_total{status="200"}' in metrics
    assert "topwork_ready 1" in metrics


def test_pages_come_with_a_strict_policy(server):
    for path in ("/", "/docs"):
        status, text, headers = server.ask("GET", path)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("DENY", "nosniff")
        assert "<script>" not in text
        assert "style=" not in text
    assert (
        "access-control-allow-origin" not in server.ask("GET", "/models", headers={"Origin": "https://example.org"})[2]
    )


# ---- wrong requests


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/nowhere", None, {}, 404),
        ("POST", "/predict/unknown", b"x", {}, 404),
        ("GET", "/static/../app.html", None, {}, 404),
        ("GET", "/static/%2e%2e%2fserver.py", None, {}, 404),
        ("GET", "/predict", None, {}, 405),
        ("DELETE", "/predict", None, {}, 405),
        ("POST", "/predict", b"", {}, 400),
        ("POST", "/predict", b"no image", {}, 422),
        ("POST", "/predict", b'{"url": "http://localhost/"}', {"Content-Type": "application/json"}, 415),
        ("POST", "/predict", b"a", {"Content-Type": "text/plain; charset=utf-8"}, 415),
        ("POST", "/predict", b"abc", {"Content-Type": "multipart/form-data"}, 400),
        ("POST", "/predict", b"abc", {"Content-Type": "multipart/form-data; boundary=x"}, 400),
        ("POST", "/predict", *form(), 400),
        ("POST", "/predict", *form(*[("a", b"b")] * 9), 413),
        ("POST", "/predict", bytes(1_000_001), {}, 413),
        ("POST", "/predict?top=0", b"x", {}, 422),
        ("POST", "/predict?explain=perhaps", b"x", {}, 422),
    ],
)
def test_a_wrong_request_is_named_in_json(server, method, path, body, headers, status):
    found, answer, names = server.ask(method, path, body, headers)
    assert found == status
    assert isinstance(answer["error"], str)
    assert answer["error"]
    assert names["content-type"] == "application/json"


def test_an_unknown_parameter_is_refused_rather_than_ignored(server, photos):
    status, answer, _ = server.ask("POST", "/predict?model=other", photos[0].read_bytes())
    assert status == 422
    assert answer["error"] == "unknown parameter 'model'; POST /predict/NAME chooses a model"


def test_no_length_is_411(server):
    answer = server.talk(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 411")


def test_a_body_is_read_no_further_than_the_limit(server):
    """An endless body: the answer arrives although the client never stops sending."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent, chunk = 0, b"10000\r\n" + bytes(65536) + b"\r\n"
        try:
            while sent < 200_000_000:
                connection.sendall(chunk)
                sent += 65536
        except OSError:
            pass
        assert sent < 30_000_000, "the limit is 1 MB, four times that is drained; the rest is what the system buffers"
    assert server.ask("GET", "/live")[0] == 200


def test_the_refusal_of_a_large_body_reaches_the_client(server):
    """Closing a connection with unread data would throw the answer away."""
    for _ in range(5):
        assert server.ask("POST", "/predict", bytes(3_000_000))[0] == 413


HOSTILE = [
    b"\0" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n",
    b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET /" + b"%ff%00" * 50 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


def test_no_bytes_give_a_server_error(server):
    with ThreadPoolExecutor(len(HOSTILE)) as pool:  # some wait for bytes that never come
        answers = list(pool.map(lambda data: server.talk(data, 3), HOSTILE))
    for data, answer in zip(HOSTILE, answers, strict=True):
        status = int(answer.split(b" ")[1]) if answer else None
        assert status is None or status in ENVELOPE | {200}, (data, answer)
        if status not in (None, 200, 400):  # 400 is the HTTP library's own
            assert json.JSONDecoder().raw_decode(answer.partition(b"\r\n\r\n")[2].decode())[0]["error"], data
    assert server.ask("GET", "/live")[0] == 200


def test_a_client_that_leaves_is_not_counted_as_a_fault(model):
    service = Service({"m": Predictor(model)}, ServeSettings())
    app = create_app(service)
    service.is_warm = True
    scope = {
        "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-length", b"9")], "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2), "asgi": {"version": "3.0"},
    }  # fmt: skip
    sent: list[object] = []
    messages = iter([{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    with ThreadPoolExecutor(1) as pool:  # Playwright, once started, has a loop of its own in this thread
        pool.submit(asyncio.run, app(scope, receive, send)).result()
    assert sent == []
    assert b"topwork_responses_total{" not in service.measures.text()


def test_mutated_requests_never_give_a_server_error(server, photos):
    rng = random.Random(0)
    body, headers = form(("a.jpg", photos[0].read_bytes()), ("b.jpg", photos[1].read_bytes()))
    head = (
        f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {headers['Content-Type']}\r\nConnection: close\r\n"
    )
    sound = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    requests = []
    for _ in range(50):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(400) if rng.random() < 0.3 else rng.randrange(len(data))
            n_bytes = rng.randint(0, 3)
            data[place : place + n_bytes] = rng.randbytes(n_bytes if rng.random() < 0.9 else rng.randint(0, 3))
        requests.append(bytes(data))
    with ThreadPoolExecutor(8) as pool:  # some wait for the rest of a length that grew
        answers = list(pool.map(lambda data: server.talk(data, 5), requests))
    seen = Counter(int(answer.split(b" ")[1]) if answer else 0 for answer in answers)
    assert set(seen) <= ENVELOPE | {0, 200}, f"0 is no answer, as to an upgrade or a longer length: {seen}"
    assert seen[200] > 10
    assert seen[0] < 5
    assert seen[400] > 0


# ---- slow clients, many clients


def test_a_slow_body_is_cut_off_and_slows_nobody(server, photos):
    data = photos[0].read_bytes()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[:100]
        )
        started = time.monotonic()
        assert server.ask("POST", "/predict", data)[0] == 200
        assert time.monotonic() - started < 1.5
        assert read_all(connection).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 6


def statuses(answer: bytes) -> list[int]:
    """The status of each answer in what came back on one connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def test_pipelined_requests_are_answered_in_order(server, photos):
    photo, headers = photos[0].read_bytes(), "Host: localhost\r\n"
    post = f"POST /predict HTTP/1.1\r\n{headers}Content-Length: {len(photo)}\r\n\r\n".encode() + photo
    get = f"GET /live HTTP/1.1\r\n{headers}\r\n".encode()
    lost = f"GET /nothing HTTP/1.1\r\n{headers}\r\n".encode()
    last = f"GET /live HTTP/1.1\r\n{headers}Connection: close\r\n\r\n".encode()
    answer = server.talk(3 * get + 2 * post + lost + post + 200 * get + last)
    assert statuses(answer) == [200] * 5 + [404, 200] + [200] * 201


def test_bodies_in_other_forms_are_taken_whole_or_refused(server, photos):
    photo = photos[0].read_bytes()
    chunks = b"".join(
        b"%x;a=b\r\n%s\r\n" % (len(part), part) for n in range(0, len(photo), 7) if (part := photo[n : n + 7])
    )
    chunked = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    label = server.ask("POST", "/predict", photo)[1]["predictions"][0]["label"]
    answer = server.talk(chunked + chunks + b"0\r\nX-After: 1\r\n\r\n")
    assert statuses(answer) == [200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"][0]["label"] == label
    old = server.talk(
        f"POST /predict HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\n\r\n".encode() + photo
    )
    assert statuses(old) == [200]
    assert json.loads(old.partition(b"\r\n\r\n")[2])["predictions"][0]["label"] == label
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    assert statuses(server.talk(head.format(len(photo) + 9).encode() + photo)) == [408], "it waits for the rest"
    short = server.talk(head.format(200).encode() + photo)
    assert statuses(short) == [422, 400], "an image that is cut off, and bytes that are no request"


def test_slow_silent_and_endless_clients_disturb_nobody(server, photos):
    """All at once: heads that come a byte at a time, bodies that never end, connections that say nothing."""
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    over = threading.Event()

    def dribble(first: bytes, piece: bytes) -> list[int]:
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as connection:
            connection.sendall(first)
            answer = b""
            while not over.is_set():
                try:
                    connection.sendall(piece)
                    answer += connection.recv(65536)
                except TimeoutError:
                    continue
                except OSError:
                    break
            return statuses(answer)

    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    before = resident(server.process.pid)
    with ThreadPoolExecutor(60) as clients:
        heads = [clients.submit(dribble, b"G", b"E") for _ in range(20)]
        chunked = [
            clients.submit(dribble, head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n") for _ in range(20)
        ]
        bodies = [clients.submit(dribble, head + b"Content-Length: 900000\r\n\r\n", b"x") for _ in range(20)]
        for _ in range(20):
            started = time.monotonic()
            assert server.ask("GET", "/live")[0] == 200
            assert server.ask("POST", "/predict", photos[0].read_bytes())[0] == 200
            assert time.monotonic() - started < 3
            time.sleep(0.2)
        over.set()
        assert all(found.result() in ([408], []) for found in chunked + bodies), "cut off; some meet a reset instead"
        assert any(found.result() == [408] for found in chunked)
        assert any(found.result() == [408] for found in bodies)
        assert all(found.result() in ([], [400]) for found in heads)
    for connection in silent:
        connection.close()
    assert resident(server.process.pid) < before + 50, "MB"


def resident(process: int) -> float:
    """MB of memory of a process."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_beyond_the_queue_there_is_503_at_once_and_memory_comes_back(model, photos):
    with serving(model, max_queue=4, max_images=4) as served:
        statuses: list[tuple[int, str | None]] = []

        def ask(path: Path) -> None:
            status, _, headers = served.ask("POST", "/predict", path.read_bytes())
            statuses.append((status, headers.get("retry-after")))

        threads = [threading.Thread(target=ask, args=(photos[n % len(photos)],)) for n in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses) == 60, "each got an answer"
        assert set(statuses) <= {(200, None), (503, "1")}
        assert (200, None) in statuses
        body, headers = form(*[("a", photos[0].read_bytes())] * 5)
        assert served.ask("POST", "/predict", body, headers)[0] == 413
        metrics = served.ask("GET", "/metrics")[1]
        assert "topwork_images_waiting 0" in metrics
        assert "topwork_held_bytes 0" in metrics
        assert served.end() == 0


def test_a_request_has_a_deadline_and_memory_a_limit(model, photos):
    photo = photos[0].read_bytes()
    with serving(model, request_seconds=0.5, max_held_mb=(len(photo) - 1) / 1e6) as served:
        status, answer, headers = served.ask("POST", "/predict", photo)
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert "too many requests" in answer["error"]
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\n\r\n".encode()
        answer = served.talk(head + photo[:100])  # the rest never comes, and --body-seconds is far away
        assert answer.startswith(b"HTTP/1.1 504")
        assert "no answer within 0.5 s" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        metrics = served.ask("GET", "/metrics")[1]
        assert "topwork_held_bytes 0" in metrics
        assert "topwork_images_waiting 0" in metrics


def test_the_limits_are_those_that_were_promised():
    settings = ServeSettings()
    assert (settings.host, settings.max_body_mb) == ("127.0.0.1", 20)
    assert (settings.idle_seconds, settings.body_seconds) == (10, 30)
    assert settings.max_queue >= 1000, "a thousand clients at a time each get an answer"
    assert SHUTDOWN_SECONDS < 30


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(server):
    """Its rows are not even there: the head is enough to refuse it."""
    status, answer, _ = server.ask("POST", "/predict", head_of_a_png(12_000))
    assert status == 422
    assert "more than 120 million pixels" in answer["error"]


def head_of_a_png(side: int) -> bytes:
    """A square gray PNG file without its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- the process


def test_sigterm_answers_what_is_in_progress_and_ends_with_status_0(model, photos):
    photo = photos[0].read_bytes()
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\n\r\n".encode()
    with serving(model) as served:
        clients = [socket.create_connection(("127.0.0.1", served.port), timeout=20) for _ in range(8)]
        silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(20)]
        for client in clients:
            client.sendall(head + photo[:100])
        wait_until(lambda: "topwork_images_waiting 8" in served.ask("GET", "/metrics")[1])
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(OSError, match=r"refused|reset"):
            served.ask("GET", "/live")
        for client in clients:
            client.sendall(photo[100:])
            with client:
                assert read_all(client).startswith(b"HTTP/1.1 200")
        assert served.process.wait(10) == 0, "clients that say nothing hold nobody back"
        for connection in silent:
            connection.close()


def test_it_listens_on_this_machine_only(server):
    others = [
        info[4][0]
        for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        if not info[4][0].startswith("127.")
    ]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((others[0] if others else "127.0.0.2", server.port), timeout=5).close()


def test_other_machines_need_a_token_or_no_auth(model):
    done = topwork("serve", model, "--port", 0, "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "--token-file" in done.stderr
    assert "--no-auth" in done.stderr
    command = [sys.executable, "-m", "topwork.cli", "serve", model, "--port", "0", "--host", "0.0.0.0", "--no-auth"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        told = [process.stderr.readline(), process.stderr.readline()]
        process.terminate()
    assert told[0].startswith("Serving run on http://0.0.0.0:")
    assert told[1] == "Other machines can connect without a password.\n"


@pytest.mark.parametrize("content", [None, "", "short", "a" * 8 + "\n" + "b" * 8, "é" * 20])
def test_a_token_file_without_a_token_is_refused(model, tmp_path, content):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    done = topwork("serve", model, "--port", 0, "--token-file", path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert str(path) in done.stderr


def test_a_token_is_asked_for_and_never_logged(model, photos, tmp_path, capfd):
    token = "secret-token-0123456789"
    (tmp_path / "token").write_text(token + "\n")
    with serving(model, token_file=tmp_path / "token") as served:
        photo = photos[0].read_bytes()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token}):
            status, answer, names = served.ask("POST", "/predict", photo, headers)
            assert (status, names["www-authenticate"]) == (401, "Bearer")
            assert "Authorization" in answer["error"]
            for path in ("/models", "/metrics"):
                assert served.ask("GET", path, headers=headers)[0] == 401
        for path in ("/", "/docs", "/live", "/ready", "/openapi.json", "/static/app.js"):
            assert served.ask("GET", path)[0] == 200
        right = {"Authorization": f"Bearer {token}"}
        assert served.ask("POST", "/predict", photo, right)[0] == 200
        assert served.ask("GET", "/models", headers=right)[0] == 200
        assert served.end() == 0
    out, err = capfd.readouterr()
    assert token not in out + err


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421), ("", 421), ("127.0.0.1.evil.example", 421)],
)  # fmt: skip
def test_other_host_names_are_refused(server, host, status):
    assert server.ask("GET", "/models", headers={"Host": host})[0] == status


def test_a_host_name_can_be_allowed(server):
    assert server.ask("GET", "/models", headers={"Host": "Model.Example:443"})[0] == 200
    assert "http://model.example/predict" in server.ask("GET", "/docs", headers={"Host": "model.example"})[1]


def test_a_taken_port_is_named(server, model):
    command = [sys.executable, "-m", "topwork.cli", "serve", str(model), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f":{server.port}: address already in use" in done.stderr


def test_ready_is_about_predictions_and_live_about_the_process(model, monkeypatch):
    predictor = Predictor(model)
    service = Service({"m": predictor}, ServeSettings())
    with TestClient(create_app(service), base_url="http://localhost") as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        service.is_closing = lambda: True
        assert client.get("/ready").json() == {"error": "closing"}
        assert (client.get("/ready").status_code, client.get("/live").status_code) == (503, 200)
    monkeypatch.setattr(predictor, "answer", lambda *args: 1 / 0)
    service = Service({"m": predictor}, ServeSettings())
    with TestClient(create_app(service), base_url="http://localhost") as client:
        wait_until(lambda: "first prediction failed" in client.get("/ready").json()["error"])
        assert (client.get("/ready").status_code, client.get("/live").status_code) == (503, 200)
        refused = client.post("/predict", content=b"x")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


def test_names_of_models():
    assert named_models(["/runs/a/model", "b=/runs/a"]) == {"a": "/runs/a/model", "b": "/runs/a"}
    for wrong in (["/runs/a", "/other/a"], ["x/y=/runs/a"], ["..=/runs/a"]):
        with pytest.raises(UsageError, match="use NAME="):
            named_models(wrong)


# ---- forms


def test_a_form_is_taken_whole_or_refused(server, photos):
    """Also files that are larger than what the parser would keep in memory, and names of all kinds."""
    photo = photos[0].read_bytes()
    names = ["a b.jpg", "é.jpg", "", "..\\x", "x" * 300]
    body, headers = form(*[(name, photo) for name in names])
    status, answer, _ = server.ask("POST", "/predict", body, headers)
    assert (status, [row["path"] for row in answer["predictions"]]) == (200, names)
    for end in (10, 40, len(photo) + 90):
        assert server.ask("POST", "/predict", body[:-end], headers)[0] == 400, end
    fields = b"".join(b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' for _ in range(101)) + b"--x--"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert server.ask("POST", "/predict", fields, kind)[0] == 400
    file = (
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nvalue\r\n--x\r\nContent-Disposition: form-data; name="i"; filename="f"\r\n\r\n'
        + photo
        + b"\r\n--x--"
    )
    status, answer, _ = server.ask("POST", "/predict", file, kind)
    assert (status, [row["path"] for row in answer["predictions"]]) == (200, ["f"])


def test_a_server_that_is_full_answers_again(server, photos):
    wait_until(lambda: server.ask("POST", "/predict", photos[0].read_bytes())[0] == 200, 10)


def test_a_port_in_use_is_named_and_leaks_no_socket(recwarn):
    with open_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(TopworkError, match=f"127.0.0.1:{port}: address already in use. Choose another --port"):
            open_socket("127.0.0.1", port)
        gc.collect()
    for port in (-1, 65536):
        with pytest.raises(UsageError, match="from 0 to 65535"):
            open_socket("127.0.0.1", port)
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]
