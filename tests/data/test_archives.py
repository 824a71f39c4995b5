"""Archives that are damaged, hostile or large: read in place, limits kept, what is wrong is named."""

from __future__ import annotations

import gzip
import io
import random
import stat
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.layouts import add
from topwork.data import archives
from topwork.data.archives import GzipStream, clean_name, is_archive, open_archive, read_member
from topwork.errors import ImageError, UsageError


def contents(n: int = 40, size: int = 3000) -> dict[str, bytes]:
    rng = random.Random(0)
    return {f"c{number % 3}/{number}.bin": rng.randbytes(size + number) for number in range(n)}


def tar(path: Path, mode: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            add(file, name, data)
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_are_read_in_any_order_and_from_threads(mode, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(archives, "_CHECKPOINT_BYTES", 1 << 14)
    monkeypatch.setattr(archives, "_SOME", 1 << 12)
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


def test_gzip_steps_back_without_starting_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(archives, "_CHECKPOINT_BYTES", 1 << 16)
    monkeypatch.setattr(archives, "_SOME", 1 << 14)
    rng = random.Random(0)
    data = rng.randbytes(400_000) + bytes(2_000_000) + rng.randbytes(300_000)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(data[:1_000_000]) + gzip.compress(data[1_000_000:]) + bytes(512))
    stream = GzipStream(path)
    assert stream.read(len(data) + 1) == data
    assert len(stream._checkpoints) > 5
    for _ in range(50):
        start, n = rng.randrange(len(data)), rng.randrange(50_000)
        assert stream.seek(start) == start
        assert stream.read(n) == data[start : start + n]
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(EOFError, match="too early"):
        GzipStream(path).read(len(data))


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
    if mode != "w":
        assert archive.rejects[-1].reason.startswith("damaged")


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
        "a/bomb.jpg": "would grow more than 200-fold",
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
    with pytest.raises(UsageError, match="grows more than 200-fold"):
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


def test_nothing_is_unpacked(tmp_path) -> None:
    path = tar(tmp_path / "x.tar.gz", "w:gz", contents())
    before = path.stat()
    for name in open_archive(path).names:
        read_member(path, name)
    assert [one.name for one in tmp_path.iterdir()] == ["x.tar.gz"]
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not is_archive(tmp_path / "missing")
    assert io.BytesIO(path.read_bytes()).read(2) == b"\x1f\x8b"
