"""The same images in every form are the same dataset; names become labels, parts and groups as documented."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.layouts import LAYOUTS, Labeled, add, folders, hub_table, read_folders, saved_dataset_dict, tar, zipped
from drawing import draw_folders
from topwork.data.folders import Found
from topwork.data.layouts import arrange, label_taker, regex_for_names
from topwork.data.listing import limited, list_data
from topwork.data.manifest import scan
from topwork.data.samples import Entry, Listing, Reject, Rules
from topwork.data.split import split, split_record
from topwork.errors import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Labeled:
    """Two classes of drawn images; their names sort differently as text and as numbers."""
    return read_folders(draw_folders(tmp_path_factory.mktemp("drawn"), n_each=11))


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    return scan(folders(images, tmp_path_factory.mktemp("reference") / "data"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_data_set_and_the_same_split(layout, images, reference, tmp_path) -> None:
    path = LAYOUTS[layout](images, tmp_path / "data")
    rules = Rules(label_regex=r"(.+)_\d+") if layout == "flat" else None
    manifest = scan(path, rules=rules)
    assert manifest.digest == reference.digest
    assert manifest.classes == reference.classes
    assert split_record(split(manifest), manifest)["digest"] == split_record(split(reference), reference)["digest"]
    rejected = [reject for reject in manifest.rejects if not reject.path.endswith((".csv", ".parquet"))]
    assert [reject.path for reject in rejected] == (["__MACOSX/data/._x.jpg"] if layout == "zip" else [])
    for row in (0, len(manifest.samples) - 1, 3):  # read again, in another order
        assert len(manifest.read(row)) == manifest.samples[row].n_bytes


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Training", "Validation", "TEST"),
        ("train", "dev", "testing"),
        ("1_train", "02-val", "3. Test"),
    ],
)
def test_part_folders_of_any_usual_name_and_case(names, images, tmp_path) -> None:
    for name in names:
        folders(images, tmp_path / name)
    manifest = scan(tmp_path)
    assert manifest.layout == "parts"
    assert {(s.path.split("/")[0], s.part) for s in manifest.samples} == set(
        zip(names, ("train", "valid", "test"), strict=True)
    )
    assert manifest.classes == ("disc", "square")


def test_parts_in_an_archive_and_in_a_saved_dataset(images, tmp_path) -> None:
    parts = {"train": images, "validation": {"disc": images["disc"]}}
    saved = saved_dataset_dict(parts, tmp_path / "saved")
    nested = {f"{part}/{label}": files for part, classes in parts.items() for label, files in classes.items()}
    archived = tar(nested, tmp_path / "tar", top="hymenoptera_data/")
    digests = set()
    for path in (saved, archived):
        manifest = scan(path)
        counts = [sum(s.part == part for s in manifest.samples) for part in ("train", "valid")]
        assert counts == [22, 11]
        digests.add(manifest.digest)
    assert len(digests) == 1


def test_only_valid_and_test_folders_are_parts_unless_they_hold_images(images, tmp_path) -> None:
    folders(images, tmp_path / "a" / "val")
    folders(images, tmp_path / "a" / "test")
    assert {s.part for s in scan(tmp_path / "a").samples} == {"valid", "test"}
    classes = {"test": images["disc"], "val": images["square"]}
    assert scan(folders(classes, tmp_path / "b")).classes == ("test", "val")


def test_a_folder_around_train_and_test_is_looked_through(images, tmp_path) -> None:
    folders(images, tmp_path / "data" / "inner" / "train")
    folders(images, tmp_path / "data" / "inner" / "test")
    manifest = scan(tmp_path / "data")
    assert manifest.layout == "parts"
    assert manifest.samples[0].path.startswith("inner/test/")


def test_a_single_class_folder_on_disk_stays_a_class(images, tmp_path) -> None:
    folders({"ants": images["disc"]}, tmp_path / "data")
    (tmp_path / "data" / "ants" / "site1").mkdir()
    (tmp_path / "data" / "ants" / "site1" / "x.jpg").write_bytes(next(iter(images["square"].values())))
    assert scan(tmp_path / "data").classes == ("ants",)


# ---- labels, groups and limits


def test_the_case_of_the_first_letter_as_in_the_pets_tutorial() -> None:
    take = label_taker(r"(?P<cat>^[A-Z])|(?P<dog>^[a-z])")
    assert [take(name) for name in ("Abyssinian_1.jpg", "images/beagle_9.jpg", "9.jpg")] == ["cat", "dog", None]
    breed = label_taker(r"(.+)_\d+")
    assert breed("images/great_pyrenees_173.jpg") == "great_pyrenees"
    assert label_taker(r"_(?P<label>\w)_")("a/b_c_d.jpg") == "c"
    assert label_taker(r"(\w+)/[^/]+$")("a/b/c.jpg") == "b"


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a valid regular"), ("abc", "in parentheses")])
def test_a_wrong_label_regex_is_named(pattern, message) -> None:
    with pytest.raises(UsageError, match=message):
        label_taker(pattern)


def test_names_that_do_not_match_are_rejected_by_name(images, tmp_path) -> None:
    root = LAYOUTS["flat"](images, tmp_path / "data")
    (root / "README").write_text("hello")
    manifest = scan(root, rules=Rules(label_regex=r"(.+)_\d+"))
    assert manifest.rejects == (Reject("README", "the name does not match --label-regex"),)


def test_groups_from_a_regex_and_from_a_column(images, tmp_path) -> None:
    path = folders(images, tmp_path / "data")
    listing = list_data(path, rules=Rules(group_by=r"_(\d)\d?\.jpg"))
    assert {entry.group for entry in listing.entries} == set("0123456789")
    with pytest.raises(UsageError, match="no such column"):
        list_data(path, rules=Rules(group_by="patient"))
    with pytest.raises(UsageError, match="matches none of the 22"):
        list_data(path, rules=Rules(group_by="patient(\\d+)"))
    table = LAYOUTS["csv"](images, tmp_path / "table")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",patient", *(f"{line},p{n % 3}" for n, line in enumerate(lines[1:]))]))
    assert {entry.group for entry in list_data(table, rules=Rules(group_by="patient")).entries} == {"p0", "p1", "p2"}


def test_a_limit_counts_per_class_and_part_and_draws_by_name_and_seed(images, tmp_path) -> None:
    folders(images, tmp_path / "train")
    folders(images, tmp_path / "test")
    listing = list_data(tmp_path, rules=Rules(limit_per_class=4))
    assert len(listing.entries) == 16
    assert any("28 images left out" in note for note in listing.notes)
    again, other = (list_data(tmp_path, rules=Rules(limit_per_class=4, seed=seed)) for seed in (0, 1))
    assert listing.entries == again.entries
    assert listing.entries != other.entries
    archived = list_data(zipped(images, tmp_path / "zip"), rules=Rules(limit_per_class=4))
    own = {entry.path.split("/")[-1] for entry in listing.entries if entry.part == "train"}
    assert {entry.path.split("/")[-1] for entry in archived.entries} == own  # the same files in another layout
    with pytest.raises(UsageError, match="at least 1"):
        list_data(tmp_path, rules=Rules(limit_per_class=0))


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 6))
def test_a_limit_keeps_as_many_as_there_are(labels, limit) -> None:
    entries = tuple(Entry(f"{label}/{number}.jpg", label) for number, label in enumerate(labels))
    kept = limited(Listing(Path(), "folders", entries, tuple("abc")), Rules(limit_per_class=limit)).entries
    assert [entry for entry in entries if entry in set(kept)] == list(kept)  # order stays
    for label in "abc":
        assert sum(e.label == label for e in kept) == min(limit, labels.count(label))


@given(st.lists(st.text(alphabet="abT/._- ", min_size=1, max_size=12), max_size=12))
def test_every_name_becomes_an_entry_or_a_reject(names) -> None:
    files = sorted({re.sub("/+", "/", name.strip("/")) for name in names} - {""})
    parents = {"/".join(pieces[:n]) for name in files if (pieces := name.split("/")) for n in range(1, len(pieces))}
    try:
        listing = arrange(Path(), Found(files, sorted(parents), []), Rules())
    except UsageError:
        return  # two readings
    named = [entry.path for entry in listing.entries] + [reject.path for reject in listing.rejects]
    folders = tuple(name for name in named if name.endswith("/"))
    assert sorted(name for name in named if name not in folders) == [
        f for f in files if not f.startswith(folders or "?")
    ]


def test_several_labels_per_image(images, tmp_path) -> None:
    rows = list(images["disc"].values())
    for number, data in enumerate(rows[:3]):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    (tmp_path / "a.csv").write_text("path,label\n0.jpg,sea|beach\n1.jpg,beach\n2.jpg, dog | sea \n")
    (tmp_path / "b.csv").write_text("path,label\n0.jpg,beach\n2.jpg,dog\n0.jpg,sea\n1.jpg,beach\n2.jpg,sea\n")
    a, b = (scan(tmp_path / name, rules=Rules(multi_label=True)) for name in ("a.csv", "b.csv"))
    assert a.digest == b.digest
    assert a.classes == b.classes == ("beach", "dog", "sea")
    assert a.counts == {"beach": 2, "dog": 1, "sea": 2}
    assert a.label_matrix.tolist() == [[True, False, True], [True, False, False], [False, True, True]]
    (tmp_path / "c.csv").write_text("path,label\n0.jpg,sea\n1.jpg,\n")
    c = scan(tmp_path / "c.csv", rules=Rules(multi_label=True))
    assert c.label_matrix.tolist() == [[True], [False]]
    assert "1 image has none of the labels." in c.notes
    with pytest.raises(UsageError, match="several labels"):
        _ = a.labels
    single = scan(tmp_path / "a.csv")
    assert single.classes == ("beach", "dog | sea", "sea|beach")  # without the flag, | is part of a name


def test_a_thousand_classes_of_two_and_names_that_could_do_harm(tmp_path) -> None:
    data = next(iter(read_folders(draw_folders(tmp_path / "one", n_each=1)).values()))
    picture = next(iter(data.values()))
    root = tmp_path / "data"
    root.mkdir()
    names = [f"class {number}" for number in range(998)] + ["../x", "<script>alert(1)</script>"]
    lines = ["path,label"]
    for number, name in enumerate(names):
        for copy in range(2):
            # Bytes after the end of a JPEG make another content of the same picture.
            (root / f"{number}-{copy}.jpg").write_bytes(picture + bytes([number % 256, number // 256, copy]))
            lines.append(f"{number}-{copy}.jpg,{name}")
    (root / "data.csv").write_text("\n".join(lines))
    manifest = scan(root / "data.csv")
    assert len(manifest.classes) == 1000
    assert {"../x", "<script>alert(1)</script>"} < set(manifest.classes)
    parts = split(manifest)
    assert {manifest.samples[row].label for row in parts.train} == set(manifest.classes)
    assert len(parts.train) + len(parts.valid) + len(parts.test) == 2000
    assert sorted(one.name for one in tmp_path.iterdir()) == ["data", "one"]


def test_a_hostile_archive_leads_nowhere(images, tmp_path) -> None:
    import tarfile

    path = tmp_path / "evil.tar"
    picture = next(iter(images["disc"].values()))
    with tarfile.open(path, "w") as file:
        add(file, "disc/good.jpg", picture)
        add(file, "square/good.jpg", picture)
        add(file, "../../evil.jpg", picture)
        add(file, "/etc/absolute.jpg", picture)
        add(file, "disc/../../up.jpg", picture)
        add(file, "disc\\..\\..\\windows.jpg", picture)
        add(file, "C:/drive.jpg", picture)
        add(file, "disc/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(file, "disc/hard.jpg", type=tarfile.LNKTYPE, linkname="disc/good.jpg")
        add(file, "disc/pipe", type=tarfile.FIFOTYPE)
        add(file, "disc/good.jpg", b"another under the same name")
    manifest = scan(path)
    assert [s.path for s in manifest.samples] == ["disc/good.jpg", "square/good.jpg"]
    reasons = {reject.path: reject.reason for reject in manifest.rejects}
    outside = ["../../evil.jpg", "/etc/absolute.jpg", "disc/../../up.jpg", "disc\\..\\..\\windows.jpg", "C:/drive.jpg"]
    assert all(reasons[name] == "leads outside the archive" for name in outside)
    assert "link" in reasons["disc/link.jpg"]
    assert "link" in reasons["disc/hard.jpg"]
    assert reasons["disc/pipe"] == "not a regular file"
    assert reasons["disc/good.jpg"] == "the name is used twice in the archive"
    assert len(manifest.rejects) == 9
    assert [one.name for one in tmp_path.iterdir()] == ["evil.tar"]


@pytest.mark.parametrize("top", ["", "pets-master/"])
@pytest.mark.parametrize("beside", ["docs", "Assets", "figures"])
def test_pictures_of_a_repository_are_no_class(top, beside, images, tmp_path) -> None:
    for part in ("train", "test"):
        folders(images, tmp_path / top / "dataset" / part)
    (tmp_path / top / beside).mkdir()
    (tmp_path / top / beside / "screenshot.png").write_bytes(b"x")
    (tmp_path / top / "README.md").write_text("x")
    listing = list_data(tmp_path)
    assert set(listing.class_names) == set(images)
    assert {entry.part for entry in listing.entries} == {"train", "test"}
    assert f"{top}{beside}/screenshot.png" in {reject.path for reject in listing.rejects}


def test_as_many_pictures_in_docs_as_elsewhere_are_a_class(images, tmp_path) -> None:
    folders(images, tmp_path / "Things" / "a")
    for number in range(60):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / f"{number}.png").write_bytes(b"x")
    assert "docs" in list_data(tmp_path).class_names


def test_folders_that_systems_make_are_no_classes(images, tmp_path) -> None:
    folders(images, tmp_path)
    label = next(iter(images))
    for folder in ("@eaDir", f"{label}/@eaDir", "#recycle", "lost+found", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "SYNOPHOTO_THUMB_M.jpg").write_bytes(b"x")
    listing = list_data(tmp_path)
    assert set(listing.class_names) == set(images)
    assert len(listing.entries) == sum(map(len, images.values()))
    assert all(reject.expected for reject in listing.rejects)


@pytest.mark.parametrize("numbers", [("0", "1"), ("1", "2"), ("00000", "00001")])
@pytest.mark.parametrize(
    "text", ['{"0": "daisy", "1": "rose"}', '["daisy", "rose"]', "daisy\nrose\n", "0 daisy\n1 rose\n"]
)
def test_class_folders_called_by_numbers_get_names(numbers, text, images, tmp_path) -> None:
    names = tmp_path / ("names.json" if text[0] in "{[" else "names.txt")
    names.write_text(text)
    for number, data in zip(numbers, images.values(), strict=True):
        folders({number: data}, tmp_path / "data")
    listing = list_data(tmp_path / "data", rules=Rules(class_names=names))
    assert listing.class_names == ("daisy", "rose")
    assert {entry.path.split("/")[0]: entry.label for entry in listing.entries} == dict(
        zip(numbers, ("daisy", "rose"), strict=True)
    )


def test_folders_of_images_and_of_masks_are_no_classes(images, tmp_path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for number, data in enumerate(images["disc"].values()):
            (tmp_path / name / f"{number}.png").write_bytes(data)
    with pytest.raises(UsageError, match="no images in class folders"):
        list_data(tmp_path)


@pytest.mark.parametrize(
    "rules",
    [
        {"path_column": "x"},
        {"label_column": "label"},
        {"split_column": "split"},
        {"encoding": "cp1252"},
        {"label_separator": "|"},
        {"class_names": __file__},
        {"root": "elsewhere"},
    ],
)
def test_options_for_tables_are_refused_where_there_is_none(rules, images, tmp_path) -> None:
    root = folders(images, tmp_path / "data")
    (name,) = rules
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} .* has no effect"):
        list_data(root, rules=Rules(**rules))


def test_a_folder_of_annotations_is_no_class(images, tmp_path) -> None:
    folders(images, tmp_path)
    (tmp_path / "Annotations").mkdir()
    for number in range(5):
        (tmp_path / "Annotations" / f"{number}.xml").write_text("<annotation/>")
    listing = list_data(tmp_path)
    assert listing.class_names == ("disc", "square")
    assert Reject("Annotations/", "5 files next to the class folders") in listing.rejects
    (tmp_path / "Annotations" / "image").write_bytes(b"abc")  # images may lack an ending
    assert list_data(tmp_path).class_names == ("Annotations", "disc", "square")


def test_a_folder_of_annotations_and_one_of_images_are_no_classes(images, tmp_path) -> None:
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / name).mkdir()
    for number, data in enumerate(images["disc"].values()):
        (tmp_path / "JPEGImages" / f"{number}.jpg").write_bytes(data)
        (tmp_path / "Annotations" / f"{number}.xml").write_text("<annotation/>")
    with pytest.raises(UsageError, match=r"no (images in )?class folders"):
        list_data(tmp_path)


def test_a_folder_of_parquet_files_as_the_hub_keeps_them(images, reference, tmp_path) -> None:
    parts = {"train-00000-of-00002": 0, "train-00001-of-00002": 1, "test-00000-of-00001": 2}
    (tmp_path / "data").mkdir()
    for name, number in parts.items():
        own = {label: dict(list(files.items())[number::3]) for label, files in images.items()}
        pq.write_table(hub_table(own), tmp_path / "data" / f"{name}.parquet", row_group_size=3)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    manifest = scan(tmp_path)
    assert manifest.digest == reference.digest
    assert {(s.path.split("/")[1].split("-")[0], s.part) for s in manifest.samples} == {
        ("train", "train"),
        ("test", "test"),
    }
    for row, sample in enumerate(manifest.samples):
        assert len(manifest.read(row)) == sample.n_bytes
    assert not manifest.n_failed


def test_several_configurations_of_the_hub_are_asked_about(images, tmp_path) -> None:
    """Sizes or tasks in folders of their own; folders called after the parts are none."""
    for place in ("160px", "full_size"):
        for part in ("train", "validation"):
            (tmp_path / place / part).mkdir(parents=True)
            pq.write_table(hub_table(images), tmp_path / place / part / "0000.parquet")
    with pytest.raises(UsageError, match=r"several configurations.*\n- .*/160px\n- .*/full_size$"):
        list_data(tmp_path)
    assert {entry.part for entry in list_data(tmp_path / "160px").entries} == {"train", "valid"}


def shard(path: Path, images: Labeled, form: str) -> None:
    """A tar as WebDataset writes it: numbered samples, an image and its label each."""
    with tarfile.open(path, "w") as file:
        rows = [(label, data) for label, files in images.items() for data in files.values()]
        for number, (label, data) in enumerate(rows):
            said = {"cls": label, "txt": label + "\n", "json": json.dumps({"label": label, "width": number})}[form]
            add(file, f"{path.stem}{number:04}.jpg", data)
            add(file, f"{path.stem}{number:04}.{form}", said.encode())


@pytest.mark.parametrize("form", ["cls", "json", "txt"])
def test_webdataset_shards(form, images, reference, tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("train-000.tar", "train-001.tar", "val-000.tar"):
        shard(tmp_path / "shards" / name, images, form)
    manifest = scan(tmp_path / "shards")
    assert Counter(sample.part for sample in manifest.samples) == {
        "train": 2 * len(reference.samples),
        "valid": len(reference.samples),
    }
    assert {(one.content_hash, one.label) for one in manifest.samples} == {
        (one.content_hash, one.label) for one in reference.samples
    }
    assert manifest.rejects == ()
    alone = scan(tmp_path / "shards" / "val-000.tar")
    assert alone.counts == reference.counts
    assert f"the .{form} files beside the images" in alone.notes[0]


def test_class_numbers_in_shards_get_names(images, tmp_path) -> None:
    numbered = {str(n): files for n, files in enumerate(images.values())}
    shard(tmp_path / "000.tar", numbered, "cls")
    (tmp_path / "classes.txt").write_text("\n".join(images))
    assert list_data(tmp_path).class_names == tuple(sorted(images))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"caption": "a dog on a lawn", "url": "x"}, "the .json files beside the images: no column label; found: path, caption, url"),
        ("0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.2 0.2\n", "the .txt files beside the images hold boxes or outlines"),
        ("[", "no images in class folders"),
    ],
)  # fmt: skip
def test_what_stands_beside_images_and_is_no_label(said, words, tmp_path) -> None:
    for number in range(4):
        (tmp_path / f"{number}x.jpg").write_bytes(bytes([number]))
        ending, text = (
            ("json", json.dumps(said | {"url": f"{number}"}))
            if isinstance(said, dict)
            else ("json" if said == "[" else "txt", said)
        )
        (tmp_path / f"{number}x.{ending}").write_text(text)
    with pytest.raises(UsageError, match=re.escape(words)):
        list_data(tmp_path)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat.1.jpg", "cat.2.jpg", "dog.1.jpg"], ["cat", "cat", "dog"]),
        (["great_dane_3.jpg", "great_dane_4.jpg", "pug (1).jpg"], ["great_dane", "great_dane", "pug"]),
        (["train/0_cat.png", "train/1_cat.png", "train/2_pick-up.png"], ["cat", "cat", "pick-up"]),
        (["1.jpg", "2.jpg", "3.jpg"], None),
    ],
)
def test_the_pattern_in_file_names_is_proposed(names, labels) -> None:
    pattern = regex_for_names(names)
    assert (pattern and [label_taker(pattern)(name) for name in names]) == labels
