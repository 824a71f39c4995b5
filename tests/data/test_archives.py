"""Archives that are damaged, hostile or large: read in place, limits kept, what is wrong is named."""

from __future__ import annotations

import gzip
import io
import random
import stat
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.layouts import add
from topwork.data import archives
from topwork.data.archives import clean_name, is_archive, open_archive, read_member
from topwork.errors import ImageError, TopworkError, UsageError


def contents(n: int = 40, size: int = 3000) -> dict[str, bytes]:
    rng = random.Random(0)
    return {f"c{number % 3}/{number}.bin": rng.randbytes(size + number) for number in range(n)}


def tar(path: Path, mode: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            add(file, name, data)
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_are_read_in_any_order_and_from_threads(mode, tmp_path) -> None:
    files = contents()
    path = tar(tmp_path / "x.tar", mode, files)
    archive = open_archive(path)
    assert archive.names == list(files)
    assert archive.folders == ["c0", "c1", "c2"]
    names = list(files)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: read_member(path, name), names)) == list(files.values())
    random.Random(1).shuffle(names)
    assert [read_member(path, name) for name in names] == [files[name] for name in names]


def test_a_compressed_tar_is_decompressed_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    files = contents()
    path = tar(tmp_path / "x.tar.gz", "w:gz", files)
    half = len(path.read_bytes()) // 2
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(512))  # joined, and padded
    name = open_archive(path).names[-1]
    (plain,) = (tmp_path / "cache" / "archives").iterdir()
    written = plain.stat().st_mtime_ns
    archives._open.cache_clear()
    assert read_member(path, name) == files[name]
    assert plain.stat().st_mtime_ns == written
    plain.unlink()
    archives._open.cache_clear()
    assert read_member(path, name) == files[name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "archives").write_text("not a folder")
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    with pytest.raises(TopworkError, match=r"archives.*cannot be written: .*. Set TOPWORK_CACHE"):
        open_archive(tar(tmp_path / "x.tar.gz", "w:gz", contents()))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from topwork.data.archives import open_archive
from topwork.errors import UsageError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_archive(__import__("pathlib").Path(sys.argv[1]))
except UsageError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def opened_apart(path: Path, tmp_path: Path) -> tuple[str, int]:
    """What is said about an archive in a process of its own, and the kilobytes that it took."""
    environment = {"PYTHONPATH": str(Path(archives.__file__).parents[2]), "TOPWORK_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], env=environment, check=True, capture_output=True, text=True
    )
    said, kilobytes = done.stdout.splitlines()
    return said, int(kilobytes)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process cannot be measured here")
def test_a_header_that_would_fill_memory_is_refused_before_it_is_decompressed(tmp_path) -> None:
    """A pax header of 1.5 GB in 6.5 MB took 3 GB and did not end."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1_500_000_000
    path = tmp_path / "x.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(30):  # the rest need not be there
            file.write(bytes(1 << 20))
    said, kilobytes = opened_apart(path, tmp_path)
    assert said.endswith("x.tar.gz: a header of 1,500,000,000 bytes, as no archive of images has.")
    assert kilobytes < 50_000
    plain = tmp_path / "x.tar"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert "a header of" in opened_apart(plain, tmp_path)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process cannot be measured here")
def test_a_zip_of_nothing_but_names_is_refused(tmp_path) -> None:
    """300,000 empty members took 544 MB."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(60_000):
            file.writestr(f"a/{number:040}.jpg", b"")
    said, kilobytes = opened_apart(path, tmp_path)
    assert "of the archive are file names" in said
    assert kilobytes < 30_000


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_of_a_cut_archive_the_sound_part_is_used_and_the_rest_named(mode, tmp_path) -> None:
    files = contents()
    path = tar(tmp_path / "x.tar", mode, files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    archive = open_archive(path)
    n_sound = 0
    for name in archive.names:
        try:
            assert read_member(path, name) == files[name]
            n_sound += 1
        except ImageError:
            assert name == archive.names[-1]
    assert 10 < n_sound < 30
    assert mode == "w" or archive.rejects[-1].reason.startswith("damaged")


@pytest.mark.parametrize(
    "content", [b"PK\3\4" + bytes(50), b"\x1f\x8b" + bytes(50), b"BZh9" + bytes(50), b"\xfd7zXZ\0" + bytes(9)]
)
def test_what_only_starts_like_an_archive_is_named(content, tmp_path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    assert is_archive(path)
    with pytest.raises(UsageError, match="cannot be read as an archive"):
        open_archive(path)


def test_damaged_members_of_a_zip_are_image_errors(tmp_path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/1.jpg", b"A" * 1000)
        file.writestr("a/2.jpg", b"B" * 1000)
    path.write_bytes(path.read_bytes().replace(b"A" * 1000, b"A" * 999 + b"C"))
    with pytest.raises(ImageError, match="CRC"):
        read_member(path, "a/1.jpg")
    assert read_member(path, "a/2.jpg") == b"B" * 1000
    with pytest.raises(ImageError, match="not in the archive"):
        read_member(path, "a/3.jpg")
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        read_member(path, "a/2.jpg")


def test_links_encrypted_and_exploding_members_of_a_zip_are_rejected(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(archives, "_HARMLESS_MEMBER_BYTES", 1 << 16)
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        link = zipfile.ZipInfo("a/link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("a/bomb.jpg", bytes(1 << 20))
        file.writestr("../up.jpg", b"x")
        file.writestr("a/.hidden.jpg", b"x")
        file.writestr("a/good.jpg", b"x")
        file.writestr("a/secret.jpg", b"x")
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\1\2", 0, data.rindex(b"a/secret.jpg"))
    data[place + 8] |= 1  # the flag of encryption in the directory
    path.write_bytes(data)
    archive = open_archive(path)
    assert archive.names == ["a/good.jpg"]
    reasons = {reject.path: reject.reason for reject in archive.rejects}
    assert reasons == {
        "a/link.jpg": "a link, which is not followed in archives",
        "a/bomb.jpg": "would expand more than 200-fold",
        "../up.jpg": "leads outside the archive",
        "a/.hidden.jpg": "hidden or system file",
        "a/secret.jpg": "encrypted",
    }


def test_limits_on_count_size_and_ratio(tmp_path, monkeypatch) -> None:
    path = tar(tmp_path / "many.tar", "w", contents(30, 10))
    monkeypatch.setattr(archives, "MAX_MEMBERS", 20)
    with pytest.raises(UsageError, match="more than 20 members"):
        open_archive(path)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1000)
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1 << 20)
    large = tar(tmp_path / "large.tar", "w", {"a/1.jpg": bytes((1 << 20) + 1), "a/2.jpg": b"x"})
    assert [reject.reason for reject in open_archive(large).rejects] == ["larger than 1 MiB"]
    monkeypatch.setattr(archives, "_HARMLESS_BYTES", 1 << 20)
    bomb = tar(tmp_path / "bomb.tar.gz", "w:gz", {f"a/{n}.jpg": bytes(1 << 20) for n in range(9)})
    with pytest.raises(UsageError, match="expands more than 200-fold"):
        open_archive(bomb)


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("./a//b.jpg", "a/b.jpg"),
        ("a\\b.jpg", "a/b.jpg"),
        ("a/..b/c..jpg", "a/..b/c..jpg"),
        ("ä/😀\n.jpg", "ä/😀\n.jpg"),
        ("../a", None),
        ("a/../../b", None),
        ("/a", None),
        ("\\\\server\\a", None),
        ("c:a", None),
        ("a\0b", None),
        ("", None),
        (".", None),
    ],
)
def test_names_stay_inside(name, cleaned) -> None:
    assert clean_name(name) == cleaned


def test_no_member_is_unpacked(tmp_path) -> None:
    path = tar(tmp_path / "x.tar.gz", "w:gz", contents())
    before = path.stat()
    for name in open_archive(path).names:
        read_member(path, name)
    assert [one.name for one in tmp_path.iterdir()] == ["x.tar.gz"]
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not is_archive(tmp_path / "missing")
    assert io.BytesIO(path.read_bytes()).read(2) == b"\x1f\x8b"


@pytest.mark.parametrize(("stored", "name"), [("Grüße/1.jpg".encode(), "Grüße/1.jpg"), (b"B\x84r/1.jpg", "Bär/1.jpg")])
def test_names_in_zips_of_macos_and_of_windows(stored, name, tmp_path) -> None:
    """Neither sets the flag for UTF-8."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("x" * len(stored), b"content")
    data = (tmp_path / "x.zip").read_bytes().replace(b"x" * len(stored), stored)
    (tmp_path / "x.zip").write_bytes(data)
    assert open_archive(tmp_path / "x.zip").names == [name]
    assert read_member(tmp_path / "x.zip", name) == b"content"
