"""The walk over a folder: it ends, counts nothing twice, opens only regular files, and takes every name there is."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topwork.data.folders import read_regular_file
from topwork.data.listing import list_data, read_image
from topwork.data.samples import Reject
from topwork.errors import ImageError, UsageError
from topwork.text import escape, natural_key


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))


def paths(root: Path) -> list[str]:
    return [entry.path for entry in list_data(root).entries]


def reasons(root: Path) -> dict[str, str]:
    return {reject.path: reject.reason for reject in list_data(root).rejects}


def test_classes_are_folders_and_nested_folders_belong_to_them(tmp_path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/deep/er/2.jpg", "dog/3", "stray.jpg")
    (tmp_path / "empty").mkdir()
    listing = list_data(tmp_path)
    assert [(e.path, e.label) for e in listing.entries] == [
        ("cat/1.jpg", "cat"),
        ("cat/deep/er/2.jpg", "cat"),
        ("dog/3", "dog"),
    ]
    assert listing.class_names == ("cat", "dog", "empty")
    assert listing.rejects == (Reject("stray.jpg", "not in a class folder"),)
    assert read_image(listing.root, listing.entries[0].path) == b"cat/1.jpg"


def test_order_is_natural_and_does_not_depend_on_the_file_system(tmp_path, monkeypatch) -> None:
    touch(tmp_path, "a/10.jpg", "a/9.jpg", "a/B.jpg", "a/a.jpg", "a10/1.jpg", "a9/1.jpg")
    expected = ["a9/1.jpg", "a10/1.jpg", "a/9.jpg", "a/10.jpg", "a/a.jpg", "a/B.jpg"]
    assert paths(tmp_path) == expected
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder: object) -> None:
            self.found = sorted(scandir(folder), key=lambda item: item.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.found

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert paths(tmp_path) == expected


@given(st.lists(st.text(min_size=1, max_size=8), max_size=8))
def test_the_natural_order_is_one_order(names) -> None:
    backwards = list(reversed(names))
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


NAMES = [
    "new\nline.jpg",
    "tab\t\"quote'.jpg",
    "comma, and; semicolon.jpg",
    "emoji 😀.jpg",
    "<img src=x onerror=alert(1)>.jpg",
    "café.jpg",  # composed
    "cafe\u0301.jpg",  # the same to the eye
    "\udcff\udcfe.jpg",  # bytes that are no UTF-8
    "..hidden? no, two dots.jpg"[2:],
    "-rf.jpg",
    " leading and trailing .jpg ",
    "back\\slash.jpg",
    "%00.jpg",
    "\u202egpj.exe",
]


@pytest.mark.skipif(os.name == "nt", reason="these names are not allowed there")
def test_any_name_the_file_system_allows(tmp_path) -> None:
    touch(tmp_path, *[f"class {name}/{name}" for name in NAMES])
    listing = list_data(tmp_path)
    assert {e.path for e in listing.entries} == {f"class {name}/{name}" for name in NAMES}
    composed = f"class {NAMES[5]}"  # the two that look the same are one class
    expected = {f"class {name}" for name in NAMES if name != NAMES[6]}
    assert {composed if e.label == f"class {NAMES[6]}" else e.label for e in listing.entries} == expected
    assert "differ only in Unicode form" in listing.notes[0]
    assert [read_image(listing.root, e.path).decode("utf-8", "surrogateescape") for e in listing.entries] == [
        e.path for e in listing.entries
    ]
    assert not any(c in escape(name) for name in NAMES for c in "\n\t\u202e\udcff")


def test_hidden_and_system_files_are_named_and_never_classes(tmp_path) -> None:
    touch(
        tmp_path,
        "cat/1.jpg",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "cat/.ipynb_checkpoints/1-checkpoint.jpg",
        ".ipynb_checkpoints/x.jpg",
        ".git/objects/12",
        "__MACOSX/cat/._1.jpg",
    )
    listing = list_data(tmp_path)
    assert listing.class_names == ("cat",)
    assert paths(tmp_path) == ["cat/1.jpg"]
    assert reasons(tmp_path) == {
        "cat/.DS_Store": "hidden or system file",
        "cat/Thumbs.db": "hidden or system file",
        "cat/.ipynb_checkpoints/1-checkpoint.jpg": "in a hidden or system folder",
        ".ipynb_checkpoints/": "hidden or system folder",
        ".git/": "hidden or system folder",
        "__MACOSX/": "hidden or system folder",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_are_opened(tmp_path) -> None:
    touch(tmp_path, "cat/1.jpg")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cat" / "socket.jpg"))
        found = reasons(tmp_path)
    assert found == {"cat/pipe.jpg": "not a regular file", "cat/socket.jpg": "not a regular file"}
    # A file can become a pipe between the walk and the reading: opening it must not wait for a writer.
    caught: list[str] = []

    def read() -> None:
        try:
            read_regular_file(tmp_path / "cat" / "pipe.jpg")
        except ImageError as error:
            caught.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert caught == ["not a regular file"]
    with pytest.raises(ImageError, match="not a regular file"):
        read_regular_file(Path("/dev/zero"))


def test_links_are_followed_once_and_loops_end(tmp_path) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    touch(outside, "far/1.jpg", "single.jpg")
    touch(data, "cat/1.jpg", "dog/2.jpg")
    (data / "cat" / "up").symlink_to(data)  # a loop
    (data / "cat" / "again.jpg").symlink_to(data / "dog" / "2.jpg")  # counted already
    (data / "dog" / "broken.jpg").symlink_to(data / "nowhere")
    (data / "dog" / "self.jpg").symlink_to(data / "dog" / "self.jpg")
    (data / "far").symlink_to(outside / "far")
    (data / "dog" / "single.jpg").symlink_to(outside / "single.jpg")
    (data / "dog" / "single_2.jpg").symlink_to(outside / "single.jpg")
    assert paths(data) == ["cat/1.jpg", "dog/2.jpg", "dog/single.jpg", "far/1.jpg"]
    found = reasons(data)
    assert found["cat/up"] == "link to a folder already listed"
    assert found["cat/again.jpg"] == "link to a file already used: dog/2.jpg"
    assert found["dog/single_2.jpg"] == "link to a file already used: dog/single.jpg"
    assert "broken link" in found["dog/broken.jpg"]
    assert "broken link or link loop" in found["dog/self.jpg"]
    assert len(found) == 5


def test_what_is_real_wins_over_a_link_that_comes_first(tmp_path) -> None:
    touch(tmp_path, "z/1.jpg", "z/2.jpg")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert paths(tmp_path) == ["z/1.jpg", "z/2.jpg"]
    assert reasons(tmp_path)["a/1.jpg"] == "link to a file already used: z/1.jpg"


@pytest.mark.parametrize("kind", ["files", "folders"])
@pytest.mark.parametrize("has_parts", [True, False])
def test_links_into_a_store_are_the_layout(kind, has_parts, tmp_path) -> None:
    touch(tmp_path, *[f"store/{label}/{n}.jpg" for label in ("cat", "dog") for n in range(3)])
    for label in ("cat", "dog"):
        folder = tmp_path / ("train" if has_parts else ".") / label
        folder.parent.mkdir(exist_ok=True)
        if kind == "folders":
            folder.symlink_to(tmp_path / "store" / label)
        else:
            folder.mkdir()
            for n in range(3):
                (folder / f"{n}.jpg").symlink_to(tmp_path / "store" / label / f"{n}.jpg")
    listing = list_data(tmp_path)
    assert {(e.path, e.label, e.part) for e in listing.entries} == {
        (f"{'train/' if has_parts else ''}{label}/{n}.jpg", label, "train" if has_parts else None)
        for label in ("cat", "dog")
        for n in range(3)
    }
    assert any("store" in note for note in listing.notes)
    assert all(reject.expected for reject in listing.rejects)


def test_chains_of_links_end(tmp_path) -> None:
    for n in range(30):  # followed without a bound, they would make 2**30 files
        touch(tmp_path, f"{n}/x.jpg")
        for name in "ab":
            (tmp_path / f"{n}" / name).symlink_to(tmp_path / f"{n + 1}")
    assert len(paths(tmp_path)) == 30


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    (tmp_path / "cat" / "2.jpg").chmod(0)
    (tmp_path / "dog").chmod(0)
    try:
        listing = list_data(tmp_path)
        assert "folder cannot be read: permission denied" in reasons(tmp_path)["dog/"]
        with pytest.raises(ImageError, match="permission denied"):
            read_image(listing.root, listing.entries[1].path)
    finally:
        (tmp_path / "dog").chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_is_used(tmp_path, monkeypatch) -> None:
    touch(tmp_path, "cat/1.jpg", "dog/3.jpg")
    scandir = os.scandir

    def failing(folder: Path) -> object:
        if Path(folder).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", failing)
    assert paths(tmp_path) == ["cat/1.jpg"]
    assert reasons(tmp_path) == {"dog/": "folder cannot be read: permission denied"}


def test_files_that_go_or_grow_are_named(tmp_path) -> None:
    touch(tmp_path, "cat/1.jpg")
    listing = list_data(tmp_path)
    (tmp_path / "cat" / "1.jpg").unlink()
    with pytest.raises(ImageError, match="no such file"):
        read_image(listing.root, listing.entries[0].path)
    (tmp_path / "cat" / "1.jpg").write_bytes(bytes(2000))
    with pytest.raises(ImageError, match="larger than"):
        read_regular_file(tmp_path / "cat" / "1.jpg", max_bytes=1000)


@pytest.mark.parametrize("make", ["missing", "empty", "flat", "text"])
def test_what_is_no_data_set_is_named_with_what_to_try(make, tmp_path) -> None:
    path = tmp_path / "x"
    if make in ("empty", "flat"):
        path.mkdir()
    if make == "flat":
        touch(path, "1.jpg", "2.jpg")
    if make == "text":
        path.write_text("hello")
    message = {
        "missing": "no such file",
        "empty": "no images",
        "flat": "2 files are not used",
        "text": "neither a folder",
    }
    with pytest.raises(UsageError, match=message[make]) as caught:
        list_data(path)
    assert "\n" not in str(caught.value)
