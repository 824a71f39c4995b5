"""Images behind URLs: listed, read, retried, refused; the S3 protocol against a server on this machine."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from drawing import draw_folders
from topwork.data import remote
from topwork.data.listing import list_data, read_image
from topwork.data.manifest import scan
from topwork.data.remote import is_url, url_of
from topwork.errors import ImageError, UsageError
from topwork.export.batch import list_inputs
from topwork.export.predictor import read_image as read_input


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
        ("nothing://bucket/a", "fsspec knows no such kind of URL"),
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
    with pytest.raises(UsageError, match="access was refused; check the credentials") as caught:
        list_data("s3://pictures/shapes")
    assert "not-to-be-seen" not in str(caught.value)


def test_a_server_that_does_not_answer(s3, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    type(s3).clear_instance_cache()
    with pytest.raises(UsageError, match="cannot be reached"):
        list_data("s3://pictures/shapes")
    type(s3).clear_instance_cache()
