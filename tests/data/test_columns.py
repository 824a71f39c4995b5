"""What the columns of a table mean: classes that look like something else, columns of 0 and 1, names, several labels."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from topwork.data.listing import list_data
from topwork.data.samples import Listing, Rules
from topwork.errors import UsageError

N = 8
ANIMALS = ["cat", "dog"] * 4


def listed(root: Path, header: Sequence[str], rows: Sequence[Sequence[object]], **rules: object) -> Listing:
    """A folder of eight images with a table."""
    (root / "images").mkdir(exist_ok=True)
    for number in range(0 if any((root / "images").iterdir()) else N):
        (root / "images" / f"{number}.jpg").write_bytes(bytes([number]))
    with open(root / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return list_data(root, rules=Rules(**rules))


def classes(listing: Listing) -> dict[str, int]:
    return dict(Counter(name for entry in listing.entries for name in entry.label.split("|")))


@pytest.mark.parametrize(
    "names",
    [
        ("nan", "None", "NA", "null"),
        ("yes", "no"),
        ("True", "False"),
        ("0", "1"),
        ("1e5", "1e6", "007", "7"),
        ("train", "test", "val"),
        ("a,b", 'q"x', "new\nline", "🐱"),
        ("-1", "1"),
        ("x" * 300, "y"),
    ],
)
def test_class_names_are_texts_whatever_they_look_like(names, tmp_path) -> None:
    rows = [[f"{number}.jpg", names[number % len(names)]] for number in range(N)]
    assert set(classes(listed(tmp_path, ["image", "label"], rows))) == set(names)


def test_an_attribute_beside_columns_of_0_and_1_is_no_class(tmp_path) -> None:
    rows = [[f"{n}.jpg", 20 + n, n // 2 % 2, n % 2, 1 - n % 2] for n in range(N)]
    listing = listed(tmp_path, ["image", "age", "male", "cat", "dog"], rows)
    assert classes(listing) == {"cat": 4, "dog": 4}
    assert "(cat, dog)" in listing.notes[0]


def test_columns_of_0_and_1_that_no_choice_makes_exclusive_are_several_labels(tmp_path) -> None:
    rows = [[f"{n}.jpg", 1, n % 2, n // 2 % 2] for n in range(N)]
    with pytest.raises(UsageError, match="--multi-label"):
        listed(tmp_path, ["image", "a", "b", "c"], rows)
    assert classes(list_data(tmp_path, rules=Rules(multi_label=True))) == {"a": 8, "b": 4, "c": 4}


@pytest.mark.parametrize("name", ["label_name", "class", "Category Name"])
def test_numbers_get_the_names_in_the_column_beside_them(name, tmp_path) -> None:
    listing = listed(tmp_path, ["id", "label", name], [[n, n % 2, ANIMALS[n]] for n in range(N)])
    assert classes(listing) == {"cat": 4, "dog": 4}
    assert f"with the names in column {name}" in listing.notes[0]


def test_a_column_that_names_numbers_in_two_ways_is_not_believed(tmp_path) -> None:
    listing = listed(tmp_path, ["id", "label", "label_name"], [[n, n % 2, ANIMALS[n // 2]] for n in range(N)])
    assert classes(listing) == {"0": 4, "1": 4}


@pytest.mark.parametrize("separator", [" ", ",", ", ", ";", "|", "/", "+", " & ", "\t"])
def test_several_labels_with_any_separator(separator, tmp_path) -> None:
    values = ["rust", "scab", f"rust{separator}scab", "healthy"]
    rows = [[f"{n}.jpg", values[n % 4]] for n in range(N)]
    listing = listed(tmp_path, ["image", "tags"], rows, multi_label=True)
    assert classes(listing) == {"rust": 4, "scab": 4, "healthy": 2}
    assert "separated by" in listing.notes[0]


def test_a_cell_that_may_name_several_is_pointed_out(tmp_path) -> None:
    listing = listed(tmp_path, ["image", "finding"], [[n, ["None", "Mass|Nodule"][n % 2]] for n in range(N)])
    assert set(classes(listing)) == {"None", "Mass", "Nodule"}, "joined as one label each"
    assert {entry.label for entry in listing.entries} == {"None", "Mass|Nodule"}
    assert "add --multi-label" in listing.notes[0]


@pytest.mark.parametrize("names", [("label1", "label2"), ("Class_1", "Class_2"), ("tag 1", "tag 2")])
def test_a_column_for_each_label(names, tmp_path) -> None:
    rows = [[f"{n}.jpg", ANIMALS[n], "tree" if n < 3 else ""] for n in range(N)]
    with pytest.raises(
        UsageError, match=f"several columns of labels: {names[0]}, {names[1]}.*--multi-label.*--label-column"
    ):
        listed(tmp_path, ["image", *names], rows)
    listing = list_data(tmp_path, rules=Rules(multi_label=True))
    assert classes(listing) == {"cat": 4, "dog": 4, "tree": 3}
    assert f"labels from columns {names[0]}, {names[1]}" in listing.notes[0]
    assert classes(list_data(tmp_path, rules=Rules(label_column=names[0]))) == {"cat": 4, "dog": 4}


def test_fractions_in_numbered_columns_are_no_labels(tmp_path) -> None:
    rows = [[f"{n}.jpg", ANIMALS[n], n / 7 + 0.01, n / 9 + 0.01] for n in range(N)]
    assert classes(listed(tmp_path, ["image", "kind", "Class1.1", "Class1.2"], rows)) == {"cat": 4, "dog": 4}


def test_one_of_two_labels_need_not_occur_alone(tmp_path) -> None:
    values = ["healthy", "scab frog_eye", "scab"]
    listing = listed(tmp_path, ["image", "labels"], [[n, values[n % 3]] for n in range(N)], multi_label=True)
    assert classes(listing) == {"healthy": 3, "scab": 5, "frog_eye": 3}


@pytest.mark.parametrize("separator", [" ", "/", "+"])
def test_names_that_only_look_like_several_stay_one(separator, tmp_path) -> None:
    names = [f"No{separator}Finding", "Mass", "Nodule"]
    listing = listed(tmp_path, ["image", "labels"], [[n, names[n % 3]] for n in range(N)], multi_label=True)
    assert set(classes(listing)) == set(names)


def test_an_image_listed_twice_with_one_label_lacks_nothing(tmp_path) -> None:
    """Tables of boxes name an image once per box."""
    rows = [[f"{n}.jpg", ANIMALS[n], n, n] for n in range(N) for _ in range(3)]
    listing = listed(tmp_path, ["filename", "class", "xmin", "ymin"], rows)
    assert classes(listing) == {"cat": 4, "dog": 4}
    assert len(listing.rejects) == 16
    assert all(reject.expected for reject in listing.rejects)
    other = tmp_path / "other"
    other.mkdir()
    listing = listed(other, ["filename", "class"], [*[[f"{n}.jpg", ANIMALS[n]] for n in range(N)], ["0.jpg", "dog"]])
    assert [(reject.reason, reject.expected) for reject in listing.rejects] == [("listed twice, also as cat", False)]


@pytest.mark.parametrize(
    ("header", "cell", "words"),
    [
        (["image", "label", "split"], "tr", "split is 'tr'; it must be train, valid"),
        (["image", "a", "b"], "0.7", "no column label"),
        (["image", "label", "where"], "x", None),
    ],
)
def test_why_a_table_is_not_used_is_said(header, cell, words, tmp_path) -> None:
    rows = [[f"{n}.jpg", ANIMALS[n] if header[1] == "label" else f"0.{n}3", cell] for n in range(N)]
    if words is None:
        assert classes(listed(tmp_path, header, rows)) == {"cat": 4, "dog": 4}
        return
    with pytest.raises(UsageError, match=r"Tables here: labels\.csv") as raised:
        listed(tmp_path, header, rows)
    assert words in str(raised.value)


@pytest.mark.parametrize("cell", ['{"choices": ["a", "b"]}', "{'choices': ['a', 'b']}", '["a", "b"]', "['a', 'b']"])
def test_lists_in_one_cell(cell, tmp_path) -> None:
    rows = [[f"{n}.jpg", cell if n else '{"choices": cut off}'] for n in range(N)]
    listing = listed(tmp_path, ["image", "labels"], rows, multi_label=True)
    assert classes(listing) == {"a": 7, "b": 7, '{"choices": cut off}': 1}


def test_a_table_of_other_images_is_said_to_be_one(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"labels.csv: 1 of the 8 files that it names are here"):
        listed(tmp_path, ["image", "label"], [[f"{n or 'x0'}1.jpg", ANIMALS[n]] for n in range(7)] + [["0.jpg", "dog"]])


def test_a_table_far_from_its_images_names_the_option(tmp_path) -> None:
    (tmp_path / "tables").mkdir()
    listed(tmp_path, ["image", "label"], [[f"{n}.jpg", ANIMALS[n]] for n in range(N)])
    table = (tmp_path / "labels.csv").rename(tmp_path / "tables" / "labels.csv")
    assert "--root" in list_data(table).notes[0]
    listing = list_data(table, rules=Rules(root=tmp_path))
    assert classes(listing) == {"cat": 4, "dog": 4}
    assert listing.entries[0].path == "images/0.jpg"


def test_a_column_of_folds_is_no_label(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no column label; found: image, fold"):
        listed(tmp_path, ["image", "fold"], [[f"{n}.jpg", n % 4] for n in range(N)])


@pytest.mark.parametrize("header", ["target", "label"])
def test_measured_numbers_are_no_classes(header, tmp_path) -> None:
    with pytest.raises(UsageError, match=rf"column {header} holds numbers or dates, such as 0\.41, most of them once"):
        listed(tmp_path, ["image", header], [[f"{n}.jpg", 0.41 + n] for n in range(N)])


def test_half_grades_are_classes(tmp_path) -> None:
    listing = listed(tmp_path, ["image", "grade"], [[f"{n}.jpg", 1 + n % 3 / 2] for n in range(N)])
    assert classes(listing) == {"1": 3, "1.5": 3, "2": 2}


def test_numbers_and_their_names_in_columns_of_any_name(tmp_path) -> None:
    rows = [[f"{n}.jpg", n % 2, ANIMALS[n]] for n in range(N)]
    assert classes(listed(tmp_path, ["image", "idx", "animal"], rows)) == {"cat": 4, "dog": 4}


def test_parts_in_a_column_of_any_name(tmp_path) -> None:
    rows = [[f"{n}.jpg", ANIMALS[n], "TEST" if n > 5 else "TRAIN"] for n in range(N)]
    listing = listed(tmp_path, ["image", "animal", "ml_use"], rows)
    assert Counter(entry.part for entry in listing.entries) == {"train": 6, "test": 2}


@pytest.mark.parametrize(
    ("names", "cells", "note"),
    [
        ("my photo {} ü.jpg", "images/my%20photo%20{}%20%C3%BC.jpg", ""),
        ("{}.jpg", "https://cdn.x.com/a/{}.jpg?token=a%2Fb", ""),
        ("{}.png", "{}.jpg", "with .png for .jpg"),
    ],
)
def test_names_as_links_or_before_a_conversion(names, cells, note, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for n in range(N):
        (tmp_path / "images" / names.format(n)).touch()
    rows = [[cells.format(n), ("cat", "dog")[n % 2]] for n in range(N)]
    listing = listed(tmp_path, ["image", "label"], rows)
    assert classes(listing) == {"cat": 4, "dog": 4}
    assert note in listing.notes[0]


def test_parts_of_fer_2013(tmp_path) -> None:
    usage = ("Training", "Training", "PublicTest", "PrivateTest")
    listing = listed(
        tmp_path, ["image", "label", "Usage"], [[f"{n}.jpg", "ab"[n % 2], usage[n // 2]] for n in range(N)]
    )
    assert [entry.part for entry in listing.entries] == ["train"] * 4 + ["test"] * 4


@pytest.mark.parametrize(("yes", "no"), [("x", ""), ("y", "n"), ("1.0", "")])
def test_columns_of_marks(yes, no, tmp_path) -> None:
    rows = [[f"{n}.jpg", *((yes, no) if n % 2 else (no, yes))] for n in range(N)]
    assert classes(listed(tmp_path, ["image", "cat", "dog"], rows)) == {"cat": 4, "dog": 4}


def test_boxes_beside_classes_and_names_without_quotes(tmp_path) -> None:
    boxes = [[f"{n}.jpg", f"n0{n % 2} {n} 2 30 4 n0{n % 2} 5 6 7 8 "] for n in range(N)]
    assert classes(listed(tmp_path, ["ImageId", "PredictionString"], boxes)) == {"n00": 4, "n01": 4}
    assert classes(listed(tmp_path, ["image", "label"], [[f"{n}.jpg", f"[{'ab'[n % 2]}]"] for n in range(N)])) == {
        "a": 4,
        "b": 4,
    }


def test_class_names_in_a_configuration(tmp_path) -> None:
    (tmp_path / "labels_map.json").write_text(
        '{"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}'
    )
    assert classes(listed(tmp_path, ["image", "label"], [[f"{n}.jpg", n % 2] for n in range(N)])) == {
        "cat": 4,
        "dog": 4,
    }
