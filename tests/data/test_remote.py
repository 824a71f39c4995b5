"""Images behind URLs: listed, read, retried, refused; the S3 protocol against a server on this machine."""

from __future__ import annotations

import inspect
import io
import json
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from drawing import draw_folders
from terminal import topwork
from topwork.cli import app
from topwork.data import remote
from topwork.data.listing import is_flat, list_data, read_image
from topwork.data.manifest import load_manifest, scan
from topwork.data.remote import is_url, url_of
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.export.inputs import list_inputs
from topwork.export.inputs import read_image as read_input
from topwork.export.runtime import model_embedder
from topwork.models.classifier import load_classifier
from topwork.run import load_run


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return draw_folders(tmp_path_factory.mktemp("drawn"), n_each=8)


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def put(fs, folder: Path, place: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
    return buffer.getvalue()


@pytest.mark.parametrize("url", ["s3://bucket/a", "memory://a", "hf://datasets/x/y", "https://host/photos.zip"])
def test_a_url_survives_being_a_path(url) -> None:
    assert is_url(url)
    assert is_url(Path(url))
    assert url_of(Path(url)) == url


@pytest.mark.parametrize("path", ["/a/b", "a/b", "C:/a", "C:\\a", "a:b", ""])
def test_a_path_is_no_url(path) -> None:
    assert not is_url(path)


@pytest.mark.parametrize("url", ["sftp://me:pass-word@host/a", "https://host/a.zip?X-Amz-Signature=pass-word"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url) -> None:
    with pytest.raises(UsageError, match="a URL with credentials would be stored") as caught:
        list_data(url)
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "zip", "table", "urls"])
def test_the_same_images_from_a_url_as_from_the_disk(kind, drawn, memory, tmp_path) -> None:
    put(memory, drawn, "/data")
    memory.pipe_file("/data/.hidden/x.jpg", b"x")
    rows = [(path.relative_to(drawn).as_posix(), path.parent.name) for path in sorted(drawn.rglob("*.*"))]
    source: str | Path = "memory://data"
    if kind == "zip":
        memory.pipe_file("/zips/data.zip", zipped(drawn))
        source = "memory://zips/data.zip"
    elif kind == "table":
        memory.pipe_file("/data/list.csv", b"path,label\n" + "".join(f"{p},{c}\n" for p, c in rows).encode())
        source = "memory://data/list.csv"
    elif kind == "urls":
        source = tmp_path / "list.csv"
        source.write_text("path,label\n" + "".join(f"memory://data/{p},{c}\n" for p, c in rows))
    expected = scan(drawn)
    found = scan(source)
    assert found.digest == expected.digest
    assert found.classes == expected.classes
    assert [reject.path for reject in found.rejects] == ([".hidden/x.jpg"] if kind == "folder" else [])
    assert (
        found.read(0)
        == (drawn / found.samples[0].path.removeprefix("memory://data/").removeprefix("memory:/data/")).read_bytes()
    )


def test_inputs_of_predict(drawn, memory) -> None:
    put(memory, drawn, "/data")
    memory.pipe_file("/data.zip", zipped(drawn))
    names = list_inputs(["memory://data"])
    assert len(names) == 16
    assert all(name.startswith("memory://data/") for name in names)
    members = list_inputs(["memory://data.zip"])
    assert len(members) == 16
    path = names[0].removeprefix("memory://data/")
    assert read_input(names[0]) == (drawn / path).read_bytes() == read_input(f"memory://data.zip/{path}")
    with pytest.raises(ImageError, match="no such bucket, folder or file"):
        read_input("memory://data/none.jpg")


def test_a_flat_folder_is_recognized(drawn, memory) -> None:
    put(memory, drawn, "/data")
    put(memory, drawn / "disc", "/flat")
    assert is_flat(Path("memory://flat"))
    assert not is_flat(Path("memory://data"))
    assert is_flat(drawn / "disc")
    assert not is_flat(drawn)
    assert not is_flat(drawn / "none")


class Slow(MemoryFileSystem):
    """A file system that waits 20 ms a read, and fails as often as asked."""

    protocol = "slow"
    failures: ClassVar[dict[str, int]] = {}
    lock = threading.Lock()
    n_open = most_open = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("slow://", "memory://"))

    def cat_file(self, path, *args, **options):
        with Slow.lock:
            Slow.n_open += 1
            Slow.most_open = max(Slow.most_open, Slow.n_open)
            left = Slow.failures.get(path, 0)
            Slow.failures[path] = left - 1
        time.sleep(0.02)
        with Slow.lock:
            Slow.n_open -= 1
        if left > 0:
            raise ConnectionResetError("secret header in the text of a library")
        return super().cat_file(path, *args, **options)


def test_reads_overlap_are_retried_and_a_file_that_stays_away_is_a_reject(drawn, memory, monkeypatch) -> None:
    fsspec.register_implementation("slow", Slow, clobber=True)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01, 0.01))
    put(memory, drawn, "/data")
    names = sorted(f"/data/{path.relative_to(drawn).as_posix()}" for path in drawn.rglob("*.*"))
    monkeypatch.setattr(Slow, "failures", {names[0]: 3, names[1]: 4})
    monkeypatch.setattr(Slow, "most_open", 0)
    manifest = scan("slow://data")
    (reject,) = manifest.rejects
    assert f"/data/{reject.path}" == names[1]
    assert reject.reason == "cannot be reached (ConnectionResetError); check the network and the endpoint"
    assert len(manifest.samples) == 15
    assert Slow.most_open >= 8


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing://bucket/a", "fsspec does not support this kind of URL"),
        ("memory://not/there", "memory://not/there: no such bucket, folder or file."),
    ],
)
def test_what_cannot_be_listed_is_named_in_one_line(url, said) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        list_data(url)
    assert "\n" not in str(caught.value)


# ---- S3


@pytest.fixture(scope="module")
def s3():
    """Moto's server; the client libraries find it and its credentials where they look for them."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fs = fsspec.filesystem("s3")
    fs.mkdir("pictures")
    yield fs
    fsspec.filesystem("s3").clear_instance_cache()
    patch.undo()
    server.stop()


def test_a_bucket(s3, drawn, tmp_path) -> None:
    put(s3, drawn, "pictures/shapes")
    s3.pipe_file("pictures/shapes.zip", zipped(drawn))
    expected = scan(drawn)
    for source in ("s3://pictures/shapes", "s3://pictures/shapes.zip"):
        manifest = scan(source)
        assert manifest.digest == expected.digest
        assert str(manifest.root) == source.replace("//", "/")
    listing = list_data("s3://pictures/shapes")
    path = listing.entries[3].path
    assert read_image(listing.root, path) == (drawn / path).read_bytes()


def test_a_bucket_that_is_not_there_and_credentials_that_are_not(s3, monkeypatch, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"^s3://nowhere/a: no such bucket, folder or file.$"):
        list_data("s3://nowhere/a")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    type(s3).clear_instance_cache()
    with pytest.raises(UsageError, match="access denied; check your credentials") as caught:
        list_data("s3://pictures/shapes")
    assert "not-to-be-seen" not in str(caught.value)


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_wrong_credentials(code, s3, monkeypatch) -> None:
    """A server that answers 403 to everything, as S3 does; moto checks no signatures."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>for not-to-be-seen</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/xml")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        type(s3).clear_instance_cache()
        with pytest.raises(UsageError, match=r"^s3://pictures/shapes: access denied; check your credentials \(.*\)\.$"):
            list_data("s3://pictures/shapes")
        with pytest.raises(ImageError, match="access denied; check your credentials"):
            read_image(Path("s3://pictures/shapes"), "a.jpg")
        server.shutdown()
        thread.join()
    type(s3).clear_instance_cache()


def test_a_folder_of_shards_in_a_bucket(s3, drawn) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for path in sorted(drawn.rglob("*.jpg")):
            for ending, data in (("jpg", path.read_bytes()), ("cls", path.parent.name.encode())):
                member = tarfile.TarInfo(f"{path.stem}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    s3.pipe_file("pictures/shards/train-000.tar", buffer.getvalue())
    listing = list_data("s3://pictures/shards")
    assert len(listing.entries) == len(list(drawn.rglob("*.jpg")))
    assert listing.class_names == ("disc", "square")
    path = listing.entries[3].path
    assert read_image(listing.root, path) == (drawn / listing.entries[3].label / Path(path).name).read_bytes()


def test_a_server_that_does_not_answer(s3, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    type(s3).clear_instance_cache()
    with pytest.raises(UsageError, match="cannot be reached"):
        list_data("s3://pictures/shapes")
    type(s3).clear_instance_cache()


# ---- what is written


GOLDEN = Path(__file__).parents[1] / "golden" / "format-2"


def command(*words: str) -> dict:
    """What a command prints with --json."""
    done = topwork(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fit_from_a_bucket_into_a_bucket_and_predict_from_there(s3, drawn, tmp_path, monkeypatch) -> None:
    put(s3, drawn, "pictures/shapes")
    s3.mkdir("results")
    options = ["--backbone", "random:test_efficientnet", "--no-near-duplicates", "--seed", "1"]
    here = command("fit", str(drawn), "--out", str(tmp_path / "run"), *options)
    there = command("fit", "s3://pictures/shapes", "--out", "s3://results/runs/one", *options)
    assert there["run"] == "s3://results/runs/one"
    assert there["report"] == "s3://results/runs/one/report.html"
    assert there["test"]["accuracy"] == here["test"]["accuracy"]
    names = {path.removeprefix("results/runs/one/") for path in s3.find("results/runs/one")}
    written = {
        path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    assert names == written
    assert json.loads(s3.cat_file("results/runs/one/settings.json"))["path"] == "s3://pictures/shapes"
    assert load_run("s3://results/runs/one").evaluation["test"]["accuracy"] == here["test"]["accuracy"]

    images = sorted(str(path) for path in drawn.rglob("*.jpg"))
    command("predict", str(tmp_path / "run"), *images, "--out", str(tmp_path / "p.csv"))
    command("predict", "s3://results/runs/one", *images, "--out", "s3://results/p.csv")
    assert s3.cat_file("results/p.csv") == (tmp_path / "p.csv").read_bytes()
    found = command(
        "evaluate", "s3://results/runs/one/model", "s3://pictures/shapes", "--out", "s3://results/evaluation"
    )
    assert s3.exists("results/evaluation/report.html")
    assert found["n"] == 16
    with pytest.raises(UsageError, match="exists already"), remote.uploaded("s3://results/p.csv", overwrite=False):
        pass
    with remote.uploaded("s3://results/evaluation", overwrite=True) as folder:
        folder.mkdir()
        (folder / "only.txt").write_text("x")
    assert s3.find("results/evaluation") == ["results/evaluation/only.txt"]
    # Said before the work, not after it.
    with (
        pytest.raises(UsageError, match=r"^--out s3://nowhere/p.csv: no such bucket, folder or file.$"),
        remote.uploaded("s3://nowhere/p.csv", overwrite=False),
    ):
        pass
    assert not s3.exists("nowhere")


def test_a_store_in_a_bucket_is_shared(s3, drawn, tmp_path, monkeypatch) -> None:
    s3.mkdir("store")
    monkeypatch.setenv("TOPWORK_STORE", "s3://store/of/us")
    classifier = load_classifier(GOLDEN)
    stored = []
    for name in ("one", "two"):
        monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / name))
        embedder = model_embedder(classifier)
        manifest = scan(drawn, visitor=embedder)
        embedder.flush()
        stored.append(embedder)
    first, second = stored
    assert (first.n_embedded, second.n_embedded) == (16, 0)
    hashes = [sample.content_hash for sample in manifest.samples]
    assert (first.store.load(hashes, "last") == second.store.load(hashes, "last")).all()
    (shard,) = s3.find(f"store/of/us/features/{first.store.folder.name}")
    s3.pipe_file(shard, b"damaged")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "three"))
    assert len(model_embedder(classifier).store) == 0
    monkeypatch.setenv("TOPWORK_STORE", "s3://nowhere/x")
    with pytest.raises(TopworkError, match=r"^s3://nowhere/x/.*: cannot be written: no such bucket, folder or file.$"):
        scan(drawn)
    monkeypatch.setenv("TOPWORK_STORE", str(tmp_path))
    with pytest.raises(UsageError, match="give a URL such as"):
        model_embedder(classifier)


def test_add_a_class_of_a_bucket(s3, drawn, tmp_path) -> None:
    put(s3, draw_folders(tmp_path / "more", n_each=8, shapes=("cross",)) / "cross", "pictures/cross")
    command(
        "fit",
        str(drawn),
        "--out",
        str(tmp_path / "run"),
        "--backbone",
        "random:test_efficientnet",
        "--no-near-duplicates",
    )
    grown = command("add-class", str(tmp_path / "run"), "s3://pictures/cross", "--out", str(tmp_path / "grown"))
    assert grown["added"] == ["cross"]
    manifest = load_manifest(tmp_path / "grown" / "manifest.parquet")
    assert sorted({sample.path.split("/")[0] for sample in manifest.samples}) == ["disc", "s3:", "square"]
    assert all(manifest.read(row) for row in range(len(manifest.samples)))


# ---- every command that writes


def writers() -> set[tuple[str, str]]:
    """Each command with the option that names what it writes, from the real command line."""
    found = set()
    for name in app:
        command = None if name.startswith("-") else app[name].default_command
        for option in ("out", "report"):
            parameter = None if command is None else inspect.signature(command).parameters.get(option)
            if parameter is not None and name != "report":
                found.add((name, f"--{option}"))
    return found


def test_every_command_that_writes_takes_a_url_or_says_that_it_does_not(drawn, tmp_path) -> None:
    data, image = str(drawn), str(next(drawn.rglob("*.jpg")))
    cases = {
        ("fit", "--out"): [data],
        ("lr-range", "--out"): [data],
        ("demo", "--out"): [],
        ("scan", "--report"): [data],
        ("evaluate", "--out"): [str(GOLDEN), data],
        ("examine", "--out"): [str(GOLDEN), data],
        ("compare", "--out"): [str(tmp_path), str(tmp_path)],
        ("compare-domains", "--out"): [data, data],
        ("predict", "--out"): [str(GOLDEN), image],
        ("export", "--out"): [str(GOLDEN)],
        ("pull", "--out"): ["somebody/model"],
        ("add-class", "--out"): [str(tmp_path), data],
        ("adapt", "--out"): [str(tmp_path), data],
        ("study", "--out"): ["normalization", data],
    }
    assert set(cases) == writers()
    for (name, option), words in cases.items():
        ending = {"lr-range": "plot.svg", "predict": "p.csv", "export": "m.onnx"}.get(name, "written")
        done = topwork(name, *words, option, f"nothing://bucket/{ending}")
        said = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2, name
        assert f"{option} nothing://bucket/{ending}: " in said, name
        assert ("fsspec does not support this kind of URL" in said) != ("give a local path for this command" in said), (
            name
        )


def test_a_page_behind_a_url(drawn, memory) -> None:
    for _ in range(2):  # a page is written again, as on the disk
        command("scan", str(drawn), "--quick", "--report", "memory://pages/scan.html")
        assert b"<html" in memory.cat_file("/pages/scan.html")


def test_other_files_behind_a_url_are_never_replaced(drawn, memory) -> None:
    memory.pipe_file("/photos/holiday.jpg", b"mine")
    for words in (["scan", str(drawn), "--report"], ["predict", str(GOLDEN), str(drawn), "--overwrite", "--out"]):
        done = topwork(*words, "memory://photos" if words[0] == "scan" else "memory://photos/")
        assert done.returncode == 2
    assert memory.cat_file("/photos/holiday.jpg") == b"mine"


def test_a_library_that_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UsageError, match=r"^gs://bucket/a: requires an fsspec library that is not installed \(Please install gcsfs"
    ):
        list_data("gs://bucket/a")


def test_a_slash_too_few_is_read_as_meant(s3, drawn) -> None:
    put(s3, drawn, "pictures/typo")
    assert list_data("s3:/pictures/typo").entries == list_data("s3://pictures/typo").entries


def test_a_network_that_fails_in_the_middle(drawn, tmp_path, monkeypatch) -> None:
    """The server ends after a third of the images: the rest are rejects, each with its reason, and the command ends."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    monkeypatch.setattr(remote, "N_READERS", 1)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    type(fs).clear_instance_cache()
    fs = fsspec.filesystem("s3")
    fs.mkdir("failing")
    put(fs, drawn, "failing/shapes")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    manifest = scan("s3://failing/shapes", on_progress=lambda done, n: server.stop() if done == 5 else None)
    type(fs).clear_instance_cache()
    assert 5 <= len(manifest.samples) < 16
    assert len(manifest.samples) + len(manifest.rejects) == 16
    assert all(reject.reason.startswith("cannot be reached (") for reject in manifest.rejects)
    assert manifest.n_failed == len(manifest.rejects)
