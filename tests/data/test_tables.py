"""Tables: columns, separators and parts as users write them; images inside Parquet; datasets of Hugging Face."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.layouts import embedded_parquet, saved_dataset
from drawing import draw_folders
from topwork.data.embedded import list_saved_dataset
from topwork.data.listing import list_data, read_image
from topwork.data.samples import Entry, Reject, Rules
from topwork.errors import ImageError, UsageError
from topwork.text import natural_key


def entries(path: Path, text: str, encoding: str = "utf-8", **rules: object) -> tuple[Entry, ...]:
    path.write_bytes(text.encode(encoding, "surrogateescape"))
    return list_data(path, rules=Rules(**rules)).entries


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_in_any_order_case_and_separator(separator, tmp_path) -> None:
    rows = [["Domain", " LABEL", "Split", "Path ", "other"], ["photo", " cat ", "Validation", "a b.jpg", "1"]]
    found = entries(tmp_path / "x.csv", "\n".join(separator.join(row) for row in rows))
    assert found == (Entry("a b.jpg", "cat", "valid", None, "photo"),)


def test_byte_order_mark_quotes_and_newlines(tmp_path) -> None:
    found = entries(tmp_path / "x.csv", '\ufeffpath,label\r\n"a, ""b""\nc.jpg",cat\r\n\r\nd.jpg,d\u00e9j\u00e0\r\n')
    assert {(e.path, e.label) for e in found} == {('a, "b"\nc.jpg', "cat"), ("d.jpg", "déjà")}


def test_file_names_in_bytes_that_are_no_utf8(tmp_path) -> None:
    (tmp_path / "\udcff.jpg").write_bytes(b"abc")  # the table and the file name come from the same Windows machine
    (tmp_path / "x.csv").write_bytes("path,label\nÿ.jpg,été\n".encode("cp1252"))
    listing = list_data(tmp_path / "x.csv")
    assert listing.entries == (Entry("\udcff.jpg", "été"),)
    assert read_image(listing.root, listing.entries[0].path) == b"abc"
    assert "as cp1252" in listing.notes[0]


def test_rows_that_cannot_be_used_are_named(tmp_path) -> None:
    (tmp_path / "x.csv").write_text(
        "path,label\na.jpg,cat\na.jpg,cat\na.jpg,dog\nb.jpg,\n,dog\nc.jpg,dog,more,cells\nd.jpg\n"
    )
    listing = list_data(tmp_path / "x.csv")
    assert [(e.path, e.label) for e in listing.entries] == [("a.jpg", "cat"), ("c.jpg", "dog")]
    assert set(listing.rejects) == {
        Reject("a.jpg", "listed twice"),
        Reject("a.jpg", "listed twice, also as cat"),
        Reject("b.jpg", "no label"),
        Reject("d.jpg", "no label"),
        Reject("(row without a path)", "no path"),
    }


def test_cells_that_are_far_too_long_are_named(tmp_path) -> None:
    (tmp_path / "x.csv").write_text(f"path,label\na.jpg,cat\n{'b' * 5000}.jpg,dog\nc.jpg,{'d' * 2000}\n")
    listing = list_data(tmp_path / "x.csv")
    assert [entry.path for entry in listing.entries] == ["a.jpg"]
    assert {(reject.path, reject.reason) for reject in listing.rejects} == {
        ("b" * 100 + "…", "a cell of 5,004 characters"),
        ("c.jpg", "a cell of 2,000 characters"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,klass\na,b\n", "no column label; found: file, klass"),
        ("label\nb\n", "no column path"),
        ("", "no column path and no column label; found: none"),
        ("path,label,split\na,b,holdout\n", "row 1: split is 'holdout'; it must be train, valid, test"),
        ("path,label\n", "no row has an image and its label"),
        ('path,label\n"a.jpg,cat\nb.jpg,dog\n', "no row has an image and its label .1 row is not used; a.jpg"),
    ],
)
def test_tables_that_cannot_be_used_say_why(text, message, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        entries(tmp_path / "x.csv", text)


HEADER, ROWS = "image,label", "a.jpg,cat\nb.jpg,dog\nc.jpg,cat\nd.jpg,dog\n"
ANIMALS = {"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "cat", "d.jpg": "dog"}


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n{ROWS}",
        ROWS,
        ROWS.replace(".jpg", ""),
        "cat,a\ndog,b\ncat,c\ndog,d\n",
        f"{HEADER}\n{ROWS}{HEADER}\n",
        f"\n\n{HEADER}\n{ROWS}",
        f"# made by hand\n#\n{HEADER}\n{ROWS}",
        f"sep=,\r\n{HEADER}\n{ROWS}",
        f"sep=;\n{HEADER}\n{ROWS}".replace(",", ";"),
        f'"sep=;"\n{HEADER}\n{ROWS}'.replace(",", ";"),
        f"{HEADER}\n{ROWS}".replace(",", "|"),
        f"{HEADER},area\n{ROWS}".replace(",", ";").replace("cat\n", "cat;3,14\n").replace("dog\n", "dog;2,7\n"),
        f"{HEADER}\n{ROWS}".replace("\n", "\r"),
        f",{HEADER}\n" + "".join(f"{n},{row}\n" for n, row in enumerate(ROWS.split())),
    ],
)
def test_csv_as_programs_write_it(text, tmp_path) -> None:
    for name in ANIMALS:
        (tmp_path / name).write_bytes(b"x")
    found = {entry.path: entry.label for entry in entries(tmp_path / "x.csv", text) if entry.path in ANIMALS}
    assert found == ANIMALS


def test_class_names_that_are_numbers_do_not_make_a_header_a_row(tmp_path) -> None:
    found = entries(tmp_path / "x.csv", "image,0,1\na.jpg,1,0\nb.jpg,0,1\n")
    assert {entry.path: entry.label for entry in found} == {"a.jpg": "0", "b.jpg": "1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a list", [{"image": path, "label": label} for path, label in ANIMALS.items()]),
        ("nested", [{"image": {"path": path, "bytes": None}, "label": {"id": 1, "name": label}} for path, label in ANIMALS.items()]),
        ("a map", ANIMALS),
        ("a map to objects", {path: {"label": label, "width": 3} for path, label in ANIMALS.items()}),
        ("images by class", {"cat": ["a.jpg", "c.jpg"], "dog": ["b.jpg", "d.jpg"]}),
        ("under a key", {"version": 1, "data": [{"file": path, "class": label} for path, label in ANIMALS.items()]}),
        ("pairs", [[path, label] for path, label in ANIMALS.items()]),
        (
            "Datumaro",
            {
                "categories": {"label": {"labels": [{"name": "cat"}, {"name": "dog"}]}},
                "items": [
                    {"id": path[:1], "image": {"path": path}, "annotations": [{"type": "label", "label_id": int(label == "dog")}]}
                    for path, label in ANIMALS.items()
                ],
            },
        ),
        ("objects by number", {str(n): {"file": path, "category": label} for n, (path, label) in enumerate(ANIMALS.items())}),
        ("SuperAnnotate", {path: {"instances": [], "tags": [label], "metadata": {"name": path}} for path, label in ANIMALS.items()}),
        ("Azure", [{"id": "1f", "originalImageUri": path, "tags": [{"tagId": "7", "tagName": label}]} for path, label in ANIMALS.items()]),
        (
            "Labelbox",
            [
                {
                    "data_row": {"id": "ck1", "external_id": path},
                    "projects": {"cl1": {"name": "P", "labels": [{"annotations": {"classifications": [{"name": "kind", "radio_answer": {"name": label, "value": label}}]}}]}},
                }
                for path, label in ANIMALS.items()
            ],
        ),
        (
            "Labelbox before 2023",
            [
                {"ID": "ck1", "External ID": path, "Label": {"objects": [], "classifications": [{"title": "kind", "answer": {"title": label}}]}}
                for path, label in ANIMALS.items()
            ],
        ),
        (
            "Label Studio with two questions",
            [
                {"data": {"image": path}, "annotations": [{"result": [
                    {"from_name": "kind", "type": "choices", "value": {"choices": [label]}},
                    {"from_name": "quality", "type": "choices", "value": {"choices": ["good"]}},
                ]}]}
                for path, label in ANIMALS.items()
            ],
        ),
        ("Prodigy", [{"image": path, "options": [{"id": "cat"}, {"id": "dog"}], "accept": [label], "answer": "accept"} for path, label in ANIMALS.items()]),
        ("FiftyOne", {"classes": ["cat", "dog"], "labels": {path: int(label == "dog") for path, label in ANIMALS.items()}}),
        ("columns", {"image": list(ANIMALS), "label": list(ANIMALS.values())}),
        (
            "columns of pandas",
            {"image": dict(zip("0123", ANIMALS, strict=True)), "label": dict(zip("0123", ANIMALS.values(), strict=True))},
        ),
    ],
)  # fmt: skip
def test_json_of_many_shapes(name, value, tmp_path) -> None:
    for path in ANIMALS:
        (tmp_path / path).touch()
    found = entries(tmp_path / "x.json", json.dumps(value))
    assert {entry.path: entry.label for entry in found} == ANIMALS, name


def test_answers_of_prodigy(tmp_path) -> None:
    rows = [
        {"image": path, "label": "cat", "answer": answer}
        for path, answer in zip(ANIMALS, ("accept", "reject", "accept", "ignore"), strict=True)
    ]
    found = entries(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    assert {entry.path: entry.label for entry in found} == {"a.jpg": "cat", "b.jpg": "not cat", "c.jpg": "cat"}


@pytest.mark.parametrize("indent", [None, 1])
def test_json_values_one_after_the_other(indent, tmp_path) -> None:
    found = entries(
        tmp_path / "x.json",
        "".join(json.dumps({"image": path, "label": label}, indent=indent) for path, label in ANIMALS.items()),
    )
    assert {entry.path: entry.label for entry in found} == ANIMALS


def test_lists_of_numbers_and_labels_of_several_words(tmp_path) -> None:
    for number in range(4):
        (tmp_path / f"{number:07}.jpg").touch()
    found = entries(tmp_path / "variants.txt", "".join(f"{n:07} {('Boeing 707', 'A320')[n % 2]}\n" for n in range(4)))
    assert {entry.path: entry.label for entry in found} == {
        f"{n:07}.jpg": ("Boeing 707", "A320")[n % 2] for n in range(4)
    }


@pytest.mark.parametrize("name", ["{}.jpg", "0{}"])
def test_lists_of_boxes_are_no_labels(name, tmp_path) -> None:
    (tmp_path / "box.txt").write_text("".join(f"{name.format(n)} {n} 4 900 600\n" for n in range(4)))
    with pytest.raises(UsageError, match="several numbers for each image, such as boxes"):
        list_data(tmp_path / "box.txt")


def test_a_first_row_that_is_a_path_like_the_others_is_no_header(tmp_path) -> None:
    """MURA's studies; a header may hold a slash, too."""
    names = [f"MURA/train/patient{n}/study1/" for n in range(4)]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "view.png").write_bytes(name.encode())
    (tmp_path / "studies.csv").write_text("".join(f"{name},{n % 2}\n" for n, name in enumerate(names)))
    assert [entry.label for entry in list_data(tmp_path / "studies.csv").entries] == ["0", "1", "0", "1"]
    rows = "".join(f"{name}view.png,AP,{'ab'[n % 2]}\n" for n, name in enumerate(names))
    (tmp_path / "views.csv").write_text(f"Path,Frontal/Lateral,label\n{rows}")
    assert [entry.label for entry in list_data(tmp_path / "views.csv").entries] == ["a", "b", "a", "b"]


def test_boxes_of_cvat_are_named(tmp_path) -> None:
    with pytest.raises(UsageError, match="boxes or outlines"):
        entries(tmp_path / "x.xml", '<annotations><image name="a.jpg"><box label="cat" xtl="1"/></image></annotations>')


def test_boxes_with_a_confidence_are_the_classes_of_the_boxes(tmp_path) -> None:
    """SIIM-FISABIO: each with a class, a confidence and four numbers."""
    cells = ["none 1 0 0 1 1", "opacity 1 789.3 582.4 1026.7 1815.5 opacity 1 2245.9 591.2 3340.6 2352.8"] * 2
    text = "".join(f"{n}.jpg,{cell}\n" for n, cell in enumerate(cells))
    rows = entries(tmp_path / "x.csv", f"path,label\n{text}")
    assert [row.label for row in rows] == ["none", "opacity"] * 2


def test_what_coco_says_about_its_images_can_group_and_divide_them(tmp_path) -> None:
    """Camera traps: images of one sequence."""
    images = [{"id": n, "file_name": f"{n}.jpg", "seq_id": f"s{n // 2}", "split": "train"} for n in range(4)]
    found = {"images": images, "categories": [{"id": 3, "name": "fox"}, {"id": 4, "name": "deer"}]}
    found["annotations"] = [{"image_id": n, "category_id": 3 + n % 2} for n in range(4)]
    rows = entries(tmp_path / "traps.json", json.dumps(found), group_by="seq_id")
    assert [(row.label, row.part, row.group) for row in rows][1:3] == [
        ("deer", "train", "s0"),
        ("fox", "train", "s1"),
    ]


def test_json_by_part(tmp_path) -> None:
    rows = [{"image": path, "label": label} for path, label in ANIMALS.items()]
    found = entries(tmp_path / "x.json", json.dumps({"train": rows[:3], "val": rows[3:]}))
    assert [entry.part for entry in found] == ["train"] * 3 + ["valid"]


def test_lists_by_part_as_of_coop(tmp_path) -> None:
    rows = [[path, int(label == "dog"), label] for path, label in ANIMALS.items()]
    found = entries(tmp_path / "split_zhou.json", json.dumps({"train": rows[:2], "val": rows[2:3], "test": rows[3:]}))
    assert {entry.path: entry.label for entry in found} == ANIMALS
    assert [entry.part for entry in found] == ["train", "train", "valid", "test"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "output.manifest",
            lambda path, label, _: {
                "source-ref": f"s3://bucket/images/{path}",
                "kind": int(label == "dog"),
                "kind-metadata": {"class-name": label, "confidence": 0.9, "human-annotated": "yes"},
            },
        ),
        (
            "import.jsonl",
            lambda path, label, part: {
                "imageGcsUri": f"gs://bucket/images/{path}",
                "classificationAnnotation": {"displayName": label},
                "dataItemResourceLabels": {"aiplatform.googleapis.com/ml_use": part},
            },
        ),
        ("import.csv", lambda path, label, part: f"{part.upper()},gs://bucket/images/{path},{label}"),
    ],
)
def test_lists_of_labeling_services_beside_the_images(name, row, tmp_path) -> None:
    """SageMaker Ground Truth and Vertex AI, with the images of the bucket in a folder."""
    parts = dict(zip(ANIMALS, ("training", "training", "validation", "test"), strict=True))
    rows = [row(path, label, parts[path]) for path, label in ANIMALS.items()]
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows)
    for path in ANIMALS:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / path).write_bytes(path.encode())
    (tmp_path / name).write_text(text)
    found = list_data(tmp_path).entries
    assert {entry.path: entry.label for entry in found} == {f"images/{path}": label for path, label in ANIMALS.items()}
    if name.startswith("import"):
        assert [entry.part for entry in found] == ["train", "train", "valid", "test"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_titles_above_a_header(separator, tmp_path) -> None:
    title = f"Labels of May{separator * 2}\n2026-05-01\n\n"
    rows = "".join(separator.join([path, label, ""]) + "\n" for path, label in ANIMALS.items())
    found = entries(tmp_path / "x.csv", title + separator.join(["image", "label", "notes"]) + "\n" + rows)
    assert {entry.path: entry.label for entry in found} == ANIMALS


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson"])
def test_an_object_per_line_with_nested_paths(ending, tmp_path) -> None:
    rows = [{"image": {"path": path}, "label": label, "note": "a\u2028b"} for path, label in ANIMALS.items()]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert {entry.path: entry.label for entry in entries(tmp_path / f"x.{ending}", text)} == ANIMALS


def test_bytes_of_images_in_json_are_refused_with_the_reason(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"x.jsonl: .*bytes of an image, as only parquet files may"):
        entries(tmp_path / "x.jsonl", json.dumps({"image": {"bytes": "/9j/4AAQ", "path": None}, "label": "cat"}))


def test_whole_numbers_with_any_number_of_zeros(tmp_path) -> None:
    """Lists of MXNet: number, label, path."""
    text = "".join(f"{n}\t{n % 2}.000000\t{path}\n" for n, path in enumerate(ANIMALS))
    assert [entry.label for entry in entries(tmp_path / "train.lst", text)] == ["0", "1", "0", "1"]


def test_lists_with_the_label_first_and_lists_of_numbers(tmp_path) -> None:
    text = "0 images/a b.jpg\n1 images/b.jpg\n0 images/c.jpg\n"
    found = {entry.path: entry.label for entry in entries(tmp_path / "x.txt", text)}
    assert found == {"images/a b.jpg": "0", "images/b.jpg": "1", "images/c.jpg": "0"}
    for text in ("1 0\n2 1\n3 1\n", "1 images/a.jpg\n2 images/b.jpg\n"):  # train_test_split.txt and images.txt of CUB
        with pytest.raises(UsageError, match="numbers lines"):
            entries(tmp_path / "x.txt", text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_excels_unicode_text(encoding, tmp_path) -> None:
    text = "path\tlabel\ncafé.jpg\tété\n"
    found = entries(tmp_path / "x.csv", "\ufeff" + text if encoding == "utf-16-be" else text, encoding)
    assert found == (Entry("café.jpg", "été"),)
    (tmp_path / "cut.csv").write_bytes(text.encode("utf-16")[:-1])
    with pytest.raises(UsageError, match=r"UTF-16.*--encoding"):
        list_data(tmp_path / "cut.csv")


@pytest.mark.parametrize(
    ("encoding", "labels"),
    [
        ("shift_jis", ("ネコ", "イヌ")),
        ("shift_jis", ("はい", "いいえ")),
        ("gbk", ("猫", "狗")),
        ("koi8-r", ("кошка", "собака")),
        ("cp1251", ("кошка", "собака")),
        ("big5", ("貓咪", "小狗")),
        ("euc_kr", ("고양이", "강아지")),
    ],
)
def test_other_encodings_are_refused_rather_than_made_classes(encoding, labels, tmp_path) -> None:
    text = "path,label\na.jpg,{}\nb.jpg,{}\n".format(*labels)
    with pytest.raises(UsageError, match="--encoding"):
        entries(tmp_path / "x.csv", text, encoding)
    listing = list_data(tmp_path / "x.csv", rules=Rules(encoding=encoding))
    assert [one.label for one in listing.entries] == list(labels)


@pytest.mark.parametrize(
    "labels", [("été", "hiver"), ("“Noël”", "naïve – œuf"), ("Größe", "ÆØ"), ("¿Qué?", "señor"), ("½ £", "20 °C ± 1")]
)
def test_western_tables_are_read_and_said(labels, tmp_path) -> None:
    (tmp_path / "x.csv").write_bytes("path,label\na.jpg,{}\nb.jpg,{}\n".format(*labels).encode("cp1252"))
    listing = list_data(tmp_path / "x.csv")
    assert {one.label for one in listing.entries} == set(labels)
    assert "as cp1252 (else: --encoding)" in listing.notes[0]


def test_paths_from_windows_and_with_blanks_and_every_spelling_of_a_file_once(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/1.jpg", "a/2.jpg", "a/back\\slash.jpg", "blank .jpg "):
        (tmp_path / name).write_bytes(b"abc")
    rows = ["a\\1.jpg,x", " a/2.jpg ,x", "./a//2.jpg,x", "a/back\\slash.jpg,x", "blank .jpg ,x"]
    (tmp_path / "x.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    listing = list_data(tmp_path / "x.csv")
    assert {e.path for e in listing.entries} == {"a/1.jpg", "a/2.jpg", "a/back\\slash.jpg", "blank .jpg "}
    assert listing.rejects == (Reject("a/2.jpg", "listed twice"),)
    assert all(read_image(listing.root, entry.path) == b"abc" for entry in listing.entries)


def test_a_row_that_names_a_folder_or_nothing_is_an_image_error(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    for name, reason in (("folder", "a folder, not a file"), ("gone.jpg", "no such file")):
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path, name)


def test_labels_from_the_names_in_a_table(tmp_path) -> None:
    found = entries(tmp_path / "x.csv", "path\na/cat_1.jpg\na/dog_2.jpg\n", label_regex=r"(.+)_\d")
    assert [e.label for e in found] == ["cat", "dog"]


def test_a_root_of_its_own(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"abc")
    (tmp_path / "x.csv").write_text("path,label\na.jpg,cat\n")
    listing = list_data(tmp_path / "x.csv", rules=Rules(root=tmp_path / "images"))
    assert read_image(listing.root, listing.entries[0].path) == b"abc"
    assert list_data(tmp_path / "x.csv").entries[0].path == "images/a.jpg"  # found beside the table as well


def test_parquet_that_is_none(tmp_path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        list_data(tmp_path / "x.parquet")


@pytest.mark.parametrize("column", ["image", "scan of the leaf"])
def test_images_inside_parquet_without_bytes_are_named_and_no_path_is_followed(column, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    rows = [{"bytes": b"one", "path": "a.jpg"}, {"bytes": None, "path": str(secret)}, None]
    pq.write_table(pa.table({column: rows, "label": ["x", "y", "z"]}), tmp_path / "x.parquet")
    listing = list_data(tmp_path / "x.parquet")
    assert [e.path for e in listing.entries] == ["0", "1", "2"]
    assert read_image(listing.root, listing.entries[0].path) == b"one"
    for entry in listing.entries[1:]:
        with pytest.raises(ImageError, match="has no data"):
            read_image(listing.root, entry.path)


@pytest.fixture
def images(tmp_path):
    from data.layouts import read_folders

    return read_folders(draw_folders(tmp_path / "drawn", n_each=6))


def test_row_groups_and_class_names_of_parquet(images, tmp_path) -> None:
    path = embedded_parquet(images, tmp_path / "data")
    assert pq.ParquetFile(path).metadata.num_row_groups == 2
    listing = list_data(path)
    assert [e.label for e in listing.entries] == ["disc"] * 6 + ["square"] * 6
    expected = [data for files in images.values() for data in files.values()]
    assert [read_image(path, e.path) for e in listing.entries] == expected


def test_class_numbers_without_a_name_are_rejected(images, tmp_path) -> None:
    folder = saved_dataset(images, tmp_path / "data")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["label"]["names"] = ["disc"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    listing = list_saved_dataset(folder, Rules())
    assert {e.label for e in listing.entries} == {"disc"}
    assert [reject.reason for reject in listing.rejects] == ["no label"] * 6


def test_the_columns_of_a_saved_dataset_mean_what_those_of_a_table_do(images, tmp_path) -> None:
    import datasets

    data = datasets.load_from_disk(str(saved_dataset(images, tmp_path / "first")))
    rows = range(len(data))
    data = data.rename_column("label", "kind").add_column("split", ["train" if n % 3 else "test" for n in rows])
    data.add_column("path", [f"a/{n}.jpg" for n in rows]).save_to_disk(str(tmp_path / "second"))
    listing = list_data(tmp_path / "second")
    assert listing.layout == "hub"
    assert listing.class_names == ("disc", "square")
    assert [entry.part for entry in listing.entries][:4] == ["test", "train", "train", "test"]
    assert read_image(listing.root, listing.entries[0].path) == next(iter(images["disc"].values()))
    data.add_column("tags", [["a", "b"][: n % 3] for n in rows]).save_to_disk(str(tmp_path / "third"))
    listing = list_data(tmp_path / "third", rules=Rules(multi_label=True, label_column="tags"))
    assert [entry.label for entry in listing.entries][:3] == ["", "a", "a|b"]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_test_part_without_labels_is_left_out(form, images, tmp_path) -> None:
    import datasets

    data = datasets.load_from_disk(str(saved_dataset(images, tmp_path / "all")))
    both = datasets.DatasetDict({"train": data, "test": data.remove_columns("label")})
    if form == "saved":
        both.save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        for part, own in both.items():
            own.to_parquet(str(tmp_path / f"data/{part}-00000-of-00001.parquet"))
    listing = list_data(tmp_path / "data")
    assert {entry.part for entry in listing.entries} == {"train"}
    assert [(one.reason, one.expected) for one in listing.rejects] == [("no column of labels", True)]
    if form == "saved":
        with pytest.raises(UsageError, match="no column label"):
            list_data(tmp_path / "data" / "test")


@pytest.mark.parametrize("other", [{"bytes": b"mask"}, b"mask"])
def test_a_second_column_of_images_is_left_alone(other, tmp_path) -> None:
    columns = {"image": [b"one", b"two"], "img": [other] * 2, "label": ["x", "y"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    listing = list_data(tmp_path / "x.parquet")
    assert [read_image(listing.root, entry.path) for entry in listing.entries] == [b"one", b"two"]


def test_a_saved_dataset_needs_its_library_and_says_so(images, tmp_path, monkeypatch) -> None:
    folder = saved_dataset(images, tmp_path / "data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'topwork\[hf\]'"):
        list_data(folder)


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "..", "a/b.arrow", "a\\b.arrow", "", 3, None])
def test_names_in_a_saved_dataset_stay_in_its_folder(name, images, tmp_path) -> None:
    folder = saved_dataset(images, tmp_path / "data")
    shutil.copy(folder / "data-00000-of-00002.arrow", tmp_path / "outside.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UsageError, match="no data files in this folder"):
        list_data(folder)
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(UsageError, match="names no splits"):
        list_data(tmp_path / "dict")


@pytest.mark.parametrize("damage", ["cut", "noise", "json", "no label"])
def test_a_damaged_saved_dataset_is_named(damage, images, tmp_path) -> None:
    folder = saved_dataset(images, tmp_path / "data")
    data = folder / "data-00000-of-00002.arrow"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:300])
    elif damage == "noise":
        data.write_bytes(b"\xff\xff\xff\xff" + bytes(range(200)))
    elif damage == "json":
        (folder / "state.json").write_text("{")
    else:
        (folder / "dataset_info.json").write_text('{"features": {"image": {"_type": "Image"}}}')
    with pytest.raises(UsageError, match=r"cannot be read|no column label"):
        list_data(folder)


hostile = st.one_of(
    st.binary(max_size=80),
    st.text(alphabet="path,label;\t|\"'[]{}:01.\n jpgé\x00", max_size=80).map(str.encode),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["images", "annotations", "data", "image", "label", "file_name", "id", "result", "a"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)


@given(hostile, st.sampled_from([".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".parquet", ".npz"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_bytes_under_any_ending_are_read_or_refused(data, ending, multi_label) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{ending}"
        path.write_bytes(data)
        for source in (path, path.parent):
            with contextlib.suppress(UsageError):
                list_data(source, rules=Rules(multi_label=multi_label))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\3\4rest", "a spreadsheet or an archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\x1f\x8brest", "unpack it first"),
    ],
)
def test_what_has_the_ending_of_a_table_only(data, words, tmp_path) -> None:
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(UsageError, match=f"labels.csv: .*{words}"):
        list_data(tmp_path / "labels.csv")


@pytest.mark.parametrize("above", ["Sample,Annotation,\n", "Study,exported,by me\n\n"])
def test_a_header_below_another_is_no_row(above, tmp_path) -> None:
    labels = {f"{n}.jpg": ("cat", "dog")[n % 2] for n in range(8)}
    for path in labels:
        (tmp_path / path).touch()
    rows = "".join(f"{path},{label},\n" for path, label in labels.items())
    found = entries(tmp_path / "x.csv", f"{above}image,label,comment\n{rows}")
    assert {entry.path: entry.label for entry in found} == labels


@pytest.mark.parametrize("cell", ["1" * 6000, "%" + "25" * 3000, "n0" + " 1" * 9000, "[" * 9000 + "]" * 9000])
def test_cells_that_are_hard_on_a_reader(cell, tmp_path) -> None:
    """More digits than int() takes, percent signs encoded again and again, brackets in brackets."""
    found = entries(tmp_path / "x.csv", f"image,label\n{cell},{cell}\na.jpg,cat\nb.jpg,dog\n")
    assert {"a.jpg": "cat", "b.jpg": "dog"}.items() <= {entry.path: entry.label for entry in found}.items()
    assert natural_key("9" * 6000) < natural_key("a")
    assert natural_key("image9") < natural_key("image10")


@pytest.mark.parametrize("text", ['["a.jpg", "b.jpg"]', "5", '"hello"', '{"images": 1, "annotations": 2}'])
def test_json_of_something_else(text, tmp_path) -> None:
    with pytest.raises(
        UsageError, match=r"x\.json: (cannot be read as JSON: it does not list images with labels|no column)"
    ):
        entries(tmp_path / "x.json", text)
