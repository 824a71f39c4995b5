"""The server: same answers as the library, every wrong request named, slow clients cut off, no request lost at the end."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from drawing import draw_folders
from topwork.commands.fit import fit
from topwork.errors import UsageError
from topwork.export.batch import row_of
from topwork.export.predictor import Predictor
from topwork.server.app import Service, create_app
from topwork.server.connection import LINGER_SECONDS
from topwork.server.multipart import MAX_HEADER_BYTES, MAX_PARTS, FormError, files_of
from topwork.server.serve import LAST_SECONDS, SHUTDOWN_SECONDS, named_models
from topwork.settings import FitSettings, ServeSettings

from .serving import Served, form, read_all, serving, wait_until

ENVELOPE = {400, 404, 405, 408, 411, 413, 415, 422, 503, 504}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    data = draw_folders(root / "data", n_each=12, shapes=("disc", "square", "cross"))
    fit(data, root / "run", FitSettings(backbone="random:test_efficientnet"))
    return root / "run"


@pytest.fixture(scope="session")
def photos(model):
    return sorted((model.parent / "data").glob("*/*.jpg"))


@pytest.fixture(scope="module")
def server(model):
    with serving(model, f"other={model}", header_seconds=2, body_seconds=2, max_images=8, max_body_mb=1) as served:
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


def test_no_length_is_411(server):
    answer = server.talk(b"POST /predict HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 411")


def test_a_body_is_read_no_further_than_the_limit(server):
    """An endless body: the answer arrives although the client never stops sending."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent, chunk = 0, b"10000\r\n" + bytes(65536) + b"\r\n"
        try:
            while sent < 200_000_000:
                connection.sendall(chunk)
                sent += 65536
        except OSError:
            pass
        assert sent < 30_000_000, "the limit is 1 MB, as much again is dropped; the rest is what the system buffers"
    assert server.ask("GET", "/live")[0] == 200


def test_the_refusal_of_a_large_body_reaches_the_client(server):
    """Closing a connection with unread data would throw the answer away."""
    for _ in range(5):
        assert server.ask("POST", "/predict", bytes(3_000_000))[0] == 413


HOSTILE = [
    b"\0" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n",
    b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /" + b"%ff%00" * 50 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_no_bytes_give_a_server_error(server, data):
    answer = server.talk(data)
    status = int(answer.split(b" ")[1]) if answer else None
    assert status is None or status in ENVELOPE | {200}, answer
    if status not in (None, 200):
        assert json.JSONDecoder().raw_decode(answer.partition(b"\r\n\r\n")[2].decode())[0]["error"]
    assert server.ask("GET", "/live")[0] == 200


@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
def test_a_client_that_closes_its_side_early_is_answered(server, photos, more):
    """Whatever it says about the connection: h11 has a state of its own for the last request of one."""
    data = photos[0].read_bytes()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(data)}\r\n\r\n"
    for _ in range(5):
        assert server.talk(head.encode() + data, has_end=True).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("data", [b"POST /pre", b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"])
def test_half_a_request_is_refused_when_the_client_closes_its_side(server, data):
    answer = server.talk(data, has_end=True)
    assert answer.startswith(b"HTTP/1.1 400")
    assert "ended before" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_client_that_leaves_is_not_counted_as_a_fault(model):
    service = Service({"m": Predictor(model)}, ServeSettings())
    app = create_app(service)
    service.is_warm = True
    scope = {
        "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
        "headers": [(b"content-length", b"9")], "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2), "asgi": {"version": "3.0"},
    }  # fmt: skip
    sent: list[object] = []
    messages = iter([{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent == []
    assert service.measures.responses == {}


def test_mutated_requests_never_give_a_server_error(server, photos):
    rng = random.Random(0)
    body, headers = form(("a.jpg", photos[0].read_bytes()), ("b.jpg", photos[1].read_bytes()))
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {headers['Content-Type']}\r\nConnection: close\r\n"
    sound = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    seen: dict[int, int] = {}
    for _ in range(200):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(400) if rng.random() < 0.3 else rng.randrange(len(data))
            n_bytes = rng.randint(0, 3)
            data[place : place + n_bytes] = rng.randbytes(n_bytes if rng.random() < 0.9 else rng.randint(0, 3))
        answer = server.talk(bytes(data), has_end=True)
        status = int(answer.split(b" ")[1]) if answer else 0
        seen[status] = seen.get(status, 0) + 1
    assert set(seen) <= ENVELOPE | {200}, f"each is answered, 0 stands for no answer: {seen}"
    assert seen.get(200, 0) > 10
    assert 400 in seen


# ---- slow clients, many clients


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nA: "])
def test_a_slow_head_is_cut_off(server, start):
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(start)
        connection.settimeout(0.3)
        answer = b""
        while time.monotonic() - started < 15:
            try:
                chunk = connection.recv(4096)
                answer += chunk
                if not chunk:
                    break
            except TimeoutError:
                if start:
                    connection.sendall(b"a")  # a drip does not buy time
    assert 1.5 < time.monotonic() - started < 6
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_slow_body_is_cut_off_and_slows_nobody(server, photos):
    data = photos[0].read_bytes()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[:100]
        )
        started = time.monotonic()
        assert server.ask("POST", "/predict", data)[0] == 200
        assert time.monotonic() - started < 1.5
        assert read_all(connection).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 6


def test_a_second_request_on_a_connection_has_the_same_time(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status": "live"}'):  # head and body may come apart
            received = connection.recv(4096)
            assert received, "closed before the answer was whole"
            answer += received
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /li")
        started = time.monotonic()
        assert read_all(connection).startswith(b"HTTP/1.1 408")
        assert 1.5 < time.monotonic() - started < 6


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
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n".encode()
        answer = served.talk(head + photo[:100])  # the rest never comes, and --body-seconds is far away
        assert answer.startswith(b"HTTP/1.1 504")
        assert "no answer within 0.5 s" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        metrics = served.ask("GET", "/metrics")[1]
        assert "topwork_held_bytes 0" in metrics
        assert "topwork_images_waiting 0" in metrics


def test_the_limits_are_those_that_were_promised():
    settings = ServeSettings()
    assert (settings.host, settings.max_body_mb) == ("127.0.0.1", 20)
    assert (settings.header_seconds, settings.body_seconds) == (10, 30)
    assert settings.max_queue >= 1000, "a thousand clients at a time each get an answer"
    assert SHUTDOWN_SECONDS + 2 * LINGER_SECONDS < 30


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


def load(served: Served, photo: bytes, stop: threading.Event, lost: list[str], answered: list[int]) -> None:
    """One client: new connections until the server is gone. A request whose connection was made must be answered."""
    while not stop.is_set():
        try:
            connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        except OSError:
            return
        with connection:
            try:
                connection.sendall(
                    f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n".encode() + photo
                )
                answer = connection.recv(65536)
                status = int(answer.split(b" ")[1]) if answer else 0
            except (OSError, IndexError) as error:
                lost.append(repr(error))
                return
        if status == 200:
            answered.append(status)
        else:
            lost.append(str(status))
            return


def end_under_load(model: Path, photo: bytes, seconds: float) -> tuple[int, list[str], int]:
    """Starts a server, loads it with eight clients, ends it; status, requests lost, requests answered."""
    with serving(model) as served:
        stop, lost, answered = threading.Event(), [], []
        threads = [threading.Thread(target=load, args=(served, photo, stop, lost, answered)) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        status = served.end()
        stop.set()
        for thread in threads:
            thread.join()
        return status, lost, len(answered)


def test_sigterm_under_load_loses_no_request(model, photos):
    status, lost, n_answered = end_under_load(model, photos[0].read_bytes(), 0.6)
    assert status == 0
    assert lost == []
    assert n_answered > 5


@pytest.mark.slow
def test_fifty_sigterms_under_load_lose_no_request(model, photos):
    for number in range(50):
        status, lost, _ = end_under_load(model, photos[0].read_bytes(), 0.2 + 0.013 * number)
        assert (status, lost) == (0, [])


def test_sigterm_with_clients_that_say_nothing_ends_soon(model):
    with serving(model) as served:
        silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(20)]
        started = time.monotonic()
        assert served.end() == 0
        assert time.monotonic() - started < 10
        for connection in silent:
            connection.close()


def test_a_client_that_connected_before_the_end_may_still_speak(model, photos):
    photo = photos[0].read_bytes()
    with serving(model) as served, socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        served.ask("GET", "/live")
        served.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        connection.sendall(
            f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n".encode() + photo
        )
        assert read_all(connection).startswith(b"HTTP/1.1 200")
        assert served.process.wait(20) == 0


HANGING = """
import sys, threading, time
from topwork.export.predictor import Predictor
from topwork.server import serve
server.LAST_SECONDS = 2.0
threading.Thread(target=time.sleep, args=(60,)).start()
listener = server.open_socket("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
server.serve({"run": Predictor(sys.argv[1])}, server.ServeSettings(), listener)
"""


def test_a_thread_that_hangs_does_not_keep_the_server_from_ending(model):
    with subprocess.Popen([sys.executable, "-c", HANGING, str(model)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        served = Served(process, int(process.stdout.readline()))
        wait_until(lambda: served.ask("GET", "/ready")[0] == 200)
        started = time.monotonic()
        assert served.end() == 0
        assert time.monotonic() - started < 20
    assert LAST_SECONDS < 30


def test_it_listens_on_this_machine_only(server):
    others = [
        info[4][0]
        for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        if not info[4][0].startswith("127.")
    ]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((others[0] if others else "127.0.0.2", server.port), timeout=5).close()


def test_whoever_lets_other_machines_in_is_told(model):
    command = [sys.executable, "-m", "topwork.cli", "serve", str(model), "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [process.stderr.readline(), process.stderr.readline()]
        process.terminate()
    assert said[0].startswith("Serving run on http://0.0.0.0:")
    assert said[1] == "Other machines can reach it, and there is no password.\n"


def test_a_taken_port_is_named(server, model):
    command = [sys.executable, "-m", "topwork.cli", "serve", str(model), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f":{server.port}: address already in use" in done.stderr


def test_ready_is_about_predictions_and_live_about_the_process(model, monkeypatch):
    predictor = Predictor(model)
    service = Service({"m": predictor}, ServeSettings())
    with TestClient(create_app(service)) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        service.is_closing = True
        assert client.get("/ready").json() == {"error": "closing"}
        assert (client.get("/ready").status_code, client.get("/live").status_code) == (503, 200)
    monkeypatch.setattr(predictor, "answer", lambda *args: 1 / 0)
    service = Service({"m": predictor}, ServeSettings())
    with TestClient(create_app(service)) as client:
        wait_until(lambda: "first prediction failed" in client.get("/ready").json()["error"])
        assert (client.get("/ready").status_code, client.get("/live").status_code) == (503, 200)
        refused = client.post("/predict", content=b"x")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


def test_names_of_models():
    assert named_models(["/runs/a/model", "b=/runs/a"]) == {"a": "/runs/a/model", "b": "/runs/a"}
    for wrong in (["/runs/a", "/other/a"], ["x/y=/runs/a"], ["..=/runs/a"]):
        with pytest.raises(UsageError, match="write NAME="):
            named_models(wrong)


# ---- forms


@given(st.lists(st.tuples(st.text("abc é.", min_size=1), st.binary()), min_size=1, max_size=5))
def test_a_form_comes_back_as_it_was(files):
    body, headers = form(*files)
    assert files_of(headers["Content-Type"], body) == files


@given(st.binary(max_size=300))
def test_any_body_is_a_form_or_a_named_error(body):
    for data in (body, b"--x\r\n" + body + b"\r\n--x--"):
        try:
            found = files_of("multipart/form-data; boundary=x", data)
        except FormError:
            continue
        assert all(isinstance(name, str) and isinstance(content, bytes) for name, content in found)


def test_a_form_has_limits():
    body, headers = form(*[("a", b"b")] * (MAX_PARTS + 1))
    with pytest.raises(FormError, match="parts"):
        files_of(headers["Content-Type"], body)
    body, headers = form(("a" * MAX_HEADER_BYTES, b"b"))
    with pytest.raises(FormError, match="headers"):
        files_of(headers["Content-Type"], body)


def test_fields_that_are_no_files_are_left_out():
    body = b'preamble\r\n--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nvalue\r\n--x\r\nContent-Disposition: form-data; filename="f"\r\n\r\n1\r\n--x--'
    assert files_of("multipart/form-data; boundary=x", body) == [("f", b"1")]


def test_a_server_that_is_full_answers_again(server, photos):
    wait_until(lambda: server.ask("POST", "/predict", photos[0].read_bytes())[0] == 200, 10)
