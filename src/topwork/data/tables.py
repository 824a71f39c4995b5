"""Tables of images: CSV, TSV, text lists, JSON, JSON Lines, Parquet, and exports of annotation tools.

In: the name and the bytes of a file. Out: a :class:`Table`, columns of text. What the columns mean is in ``columns.py``.
COCO, Label Studio and CVAT become the columns ``path`` and ``label``.
"""

from __future__ import annotations

import csv
import io
import json
import locale
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from topwork.data.layouts import PART_NAMES, looks_like_image
from topwork.errors import UsageError
from topwork.text import escape

Cell = str | list[str] | None
LIST_ENDINGS = (".txt", ".lst", ".list")
LINE_ENDINGS = (".jsonl", ".ndjson", ".manifest")  # an object per line; the last is what SageMaker writes
ENDINGS = (".csv", ".tsv", ".tab", ".parquet", ".json", *LINE_ENDINGS, ".xml", *LIST_ENDINGS)
# Where an object holds what counts; the last four in files of Azure, SageMaker and Vertex AI.
_KEYS = (
    "choices", "path", "file_name", "filename", "name", "label",
    "tagName", "class-name", "displayName", "aiplatform.googleapis.com/ml_use",
)  # fmt: skip
# First bytes, in lower case, of what has the ending of a table only.
_NO_TABLES = {
    b"pk\3\4": "a spreadsheet or an archive, whatever its ending; save it as CSV",
    b"\xd0\xcf\x11\xe0": "a spreadsheet, whatever its ending; save it as CSV",
    b"\x1f\x8b": "compressed, whatever its ending; unpack it first (gunzip)",
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull replaces it by the table",
    b"<!doctype html": "a web page, so its download failed; download it again",
    b"<html": "a web page, so its download failed; download it again",
}
_LOOKED_AT = 1000  # rows
_DAMAGE = (csv.Error, ElementTree.ParseError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
# What Shift-JIS, GBK, KOI8-R or UTF-16 look like in Windows-1252: control characters, marks that no Western word holds, three
# accented letters in a row.
_NOT_WESTERN = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f]|\w[ƒ†‡ˆ‰‚¢¤¦¨¬¯±´¶¸¹¼¾]|[ƒ‚†‡ˆ‰¢¤¦¨¬¯±¶¸¹¼¾]\w|[À-ÖØ-öø-ÿŠšŽžŒœŸƒ]{3}"
)
_NEXT, _DECODER = re.compile(r"\s*(?=\S)"), json.JSONDecoder()
_NUMBERS = re.compile(r"-?[\d.]+(\s+-?[\d.]+)+")
_MANY_COLUMNS = 200
_LARGEST_CELL = 1 << 28  # the csv module refuses whole files for one cell above its own limit of 128 kB


@dataclass(frozen=True)
class Table:
    """Columns of equal length by name, in the order of the file.

    Attributes:
        encoding: of its text; None if the format fixes it.
        class_columns: columns that the format marks as classes.
    """

    name: str
    columns: Mapping[str, Sequence[Cell]]
    encoding: str | None = None
    class_columns: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))


def read_table(name: str, data: bytes, encoding: str | None = None) -> Table:
    """The columns of a table, by the ending of its name.

    Raises:
        UsageError: it cannot be read, with the reason.
    """
    ending = Path(name).suffix.lower()
    head = data[:100].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if (other := next((what for magic, what in _NO_TABLES.items() if head.startswith(magic)), None)) is not None:
        raise UsageError(f"{escape(name)}: {other}.")
    try:
        if ending == ".parquet":
            return _parquet(name, data)
        if ending == ".xml":
            return table_of_rows(name, _cvat(data))
        text, used = decoded(name, data, encoding)
        if ending in (".json", *LINE_ENDINGS):
            return table_of_rows(name, _json_rows(_json(text, ending)))
        columns = _list_columns(text) if ending in LIST_ENDINGS else _csv_columns(text)
        return Table(name, columns, used)
    except _DAMAGE as error:
        is_other = isinstance(error, (KeyError, TypeError, AttributeError))
        reason = "it does not list images with labels" if is_other else str(error).partition("\n")[0].lower()
        raise UsageError(f"{escape(name)}: cannot be read as {ending.strip('.').upper()}: {reason}.") from None


def decoded(name: str, data: bytes, encoding: str | None = None) -> tuple[str, str]:
    """The text of a file and its encoding: UTF-8 or, by its mark, UTF-16; else the platform's; else Windows-1252.

    Raises:
        UsageError: no encoding fits, or the requested one does not.
    """
    if encoding is not None:
        tried = [encoding]
    elif data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        tried = ["utf-16"]
    elif data[1:2] == b"\0" and data[3:4] == b"\0":
        tried = ["utf-16-le"]
    elif data[:1] == b"\0" and data[2:3] == b"\0":
        tried = ["utf-16-be"]
    else:
        tried = ["utf-8-sig", locale.getpreferredencoding(False), "cp1252"]
    for one in tried:
        try:
            text = data.decode(one)
            if one == encoding or one.startswith("utf") or not _NOT_WESTERN.search(text):
                return text, one
        except UnicodeDecodeError:
            continue
        except LookupError:
            raise UsageError(
                f"--encoding {escape(one)}: no such encoding. Common ones: utf-8, cp1252, shift_jis."
            ) from None
    names = ", ".join(dict.fromkeys(one.upper().removesuffix("-SIG") for one in tried))
    raise UsageError(
        f"{escape(name)}: cannot be read as text in {names}. Specify its encoding, such as --encoding shift_jis."
    )


# ---- text


def _csv_columns(text: str) -> dict[str, list[Cell]]:
    csv.field_size_limit(_LARGEST_CELL)
    text, delimiter = _from_header(text)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    return _columns_of_rows(rows)


def _from_header(text: str) -> tuple[str, str]:
    """The text without what stands above its header, and what separates its columns.

    Excel says so in a first line ``sep=;``; else it is the most frequent sign in the header.
    """
    if said := re.match(r'"?sep=(.)"?\r?\n', text):
        return text[said.end() :], said[1]
    text = re.sub(r"\A(?:[ \r\n]|#[^,;\t|\r\n]*[\r\n])+", "", text)  # blank lines and comments
    lines = re.split(r"\r\n?|\n", text, maxsplit=20)[:20]
    return text, max(",;\t|", key=next((line for line in lines if re.search(r"[,;\t|]", line)), "").count)


def _columns_of_rows(rows: list[list[str]]) -> dict[str, list[Cell]]:
    """Columns under the names in the first row, below titles of one cell; if that is a row like the others, under numbers."""
    is_wide = any(sum(map(bool, row)) > 1 for row in rows[:20])
    while is_wide and sum(map(bool, rows[0])) == 1 and not looks_like_image("".join(rows[0])):
        rows = rows[1:]
    header = [name.strip() for name in rows[0]] if rows else []
    if _is_data(header, rows[1:_LOOKED_AT]):
        header = [f"column {number + 1}" for number in range(len(header))]
    else:
        rows = rows[1:]
    own = [name or f"column {number + 1}" for number, name in enumerate(header)]
    return {
        name: [row[number] if number < len(row) else None for row in rows]
        for number, name in enumerate(own)
        if name not in own[:number]
    }


def _is_data(header: list[str], rows: list[list[str]]) -> bool:
    """Whether the first row names an image or only numbers, or holds a word or a path as its column does: then it is no header."""
    if rows and all(re.fullmatch(r"[\d.]+", cell.strip()) for row in [header, *rows] for cell in row):
        return True
    words = {number: name for number, name in enumerate(header) if name and not re.fullmatch(r"[\d.,-]+", name)}
    return any(looks_like_image(name) for name in header) or any(
        row[number].strip() == word or ("/" in word and row[number].startswith(word.partition("/")[0] + "/"))
        for row in rows
        if [cell.strip() for cell in row] != header  # files that were joined repeat theirs
        for number, word in words.items()
        if number < len(row)
    )


def _list_columns(text: str) -> dict[str, list[Cell]]:
    """Lines of a path and its label or labels, as Caffe, darknet, timm and torchvision write them; or of a path alone."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and any(delimiter in lines[0] for delimiter in ",;\t"):
        return _csv_columns("\n".join(lines))
    if (columns := _in_blanks(lines)) is not None:
        return columns
    paths: list[Cell] = []
    labels: list[Cell] = []
    is_last = False
    for line in lines:
        named = re.match(r"(.+?\.\w{3,4})\s+(\S.*)$", line)
        first, _, rest = line.partition(" ")
        if named and looks_like_image(named[1]):
            path, label = named[1], named[2]
        elif looks_like_image(rest) and not looks_like_image(first):
            path, label, is_last = rest.strip(), first, True
        elif looks_like_image(line):
            path, label = line, ""
        else:
            path, label = first, re.sub(r"^(\d+)( +-?[\d.]+){1,2}$", r"\1", rest.strip())  # more numbers: Oxford's pets
        paths.append(path)
        labels.append(label or None)
    is_numbered = all(re.fullmatch("0|[1-9][0-9]*", str(path)) for path in paths) or (
        is_last and len(set(labels)) == len(labels)
    )
    n_numbers = {len(label.split()) if label and _NUMBERS.fullmatch(label) else 0 for label in map(str, labels)}
    if len(paths) > 1 and len(n_numbers) == 1 and min(n_numbers) > 3:
        raise ValueError("it holds several numbers for each image, such as boxes, and no label")
    if len(paths) > 1 and is_numbered:
        raise ValueError("it numbers lines, and labels no images")
    return {"path": paths, "label": labels} if any(labels) else {"path": paths}


def _in_blanks(lines: list[str]) -> dict[str, list[Cell]] | None:
    """A header and rows separated by blanks, as CelebA's: a first line with the number of rows, no name for the path."""
    rows = [line.split() for line in lines[lines[:1] == [str(len(lines) - 2)] :]]
    if len(rows) < 2 or len(rows[0]) < 3 or any(map(looks_like_image, rows[0])):
        return None
    header = ["path"] * (len(rows[1]) - len(rows[0])) + rows[0]
    if any(len(row) != len(header) or not looks_like_image(row[0]) for row in rows[1:]):
        return None
    return _columns_of_rows([header, *rows[1:]])


# ---- JSON and XML


def table_of_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table of objects; missing values are None.

    If no key of an object in it says what counts, each value inside becomes a column.
    """
    found = list(rows)
    columns = _columns_of(found)
    closed = [key for key, cells in columns.items() if not any(cells)]
    inner = _columns_of([dict(_values_in(row, closed)) for row in found])
    if any(map(any, inner.values())) and len(inner) <= _MANY_COLUMNS:
        columns = {key: cells for key, cells in columns.items() if key not in closed}
        for key, cells in inner.items():
            own = key.rpartition(".")[2]
            if cells not in columns.values():
                columns[key if own in columns else own] = cells
    return Table(name, columns)


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Cell]]:
    names = dict.fromkeys(key for row in rows for key in row)
    return {str(key): [_cell(row.get(key)) for row in rows] for key in names}


def _values_in(row: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The values in the objects under some keys, at any depth, with the keys that lead to them; a list of one counts as that one."""
    for key in keys:
        value = row.get(key)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in _values_in(value, value))
        elif not isinstance(value, list):
            yield key, value


def _cell(value: Any) -> Cell:
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, (list, tuple)):
        return [text for item in value if isinstance(text := _cell(item), str)]
    if isinstance(value, dict):
        if value.get("bytes") and not value.get("path"):
            raise ValueError("an object holds the bytes of an image, as only Parquet files may")
        return _cell(next((value[key] for key in _KEYS if value.get(key) is not None), None))
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _json(text: str, ending: str) -> Any:
    """The content of a JSON file; a list of all values if there are several, as in JSON Lines."""
    values, position = [], 0
    while start := _NEXT.match(text, position):
        value, position = _DECODER.raw_decode(text, start.end())
        values.append(value)
    if not values:
        raise ValueError("it is empty")
    return values if ending in LINE_ENDINGS or len(values) > 1 else values[0]


def _json_rows(value: Any) -> Iterator[Mapping[str, Any]]:
    """Rows of COCO, of Label Studio, of a list of objects, or of an object that holds any of them or columns."""
    if isinstance(value, dict):
        yield from _coco(value) if "images" in value and "annotations" in value else _rows_in_object(value)
        return
    if value and all(isinstance(item, dict) and isinstance(item.get("data"), dict) for item in value):
        yield from _label_studio(value)
        return
    for item in value:
        if isinstance(item, list):
            yield {f"column {number + 1}": cell for number, cell in enumerate(item)}
        elif item.get("answer") in ("accept", "reject", "ignore"):
            yield _prodigy(item)
        else:
            yield item


def _rows_in_object(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Rows of the VGG Image Annotator, Datumaro and FiftyOne; rows under a key, or under the names of the parts; columns; images by class; or the label of each path."""
    images = value.get("_via_img_metadata", value)
    if all(isinstance(one, dict) and "file_attributes" in one for one in images.values()):
        yield from ({"path": one["filename"], **one["file_attributes"]} for one in images.values())
        return
    if (labeled := _datumaro(value) or _fiftyone(value)) is not None:
        yield from labeled
        return
    lists = {key: own for key, own in value.items() if isinstance(own, list) and own}
    rows = {key: own for key, own in lists.items() if all(_is_row(item) for item in own)}
    columns = {
        key: own if isinstance(own, list) else list(own.values()) for key, own in value.items() if _is_column(own)
    }
    paths = [key for key, own in columns.items() if isinstance(own[0], str) and looks_like_image(own[0])]
    if len(rows) == 1 or (rows and all(key.lower() in PART_NAMES for key in rows)):
        for key, own in rows.items():
            yield from ({"split": key, **row} if len(rows) > 1 else row for row in _json_rows(own))
    elif not columns and all(isinstance(own, dict) for own in value.values()):
        yield from ({"path" if looks_like_image(key) else "id": key, **own} for key, own in value.items())
    elif any(looks_like_image(key) for key in value) or len(columns) < len(value) or not paths:
        yield from ({"path": path, "label": label} for path, label in value.items())
    elif len(paths) == len(columns):
        what = "split" if all(key.lower() in PART_NAMES for key in columns) else "label"
        yield from ({"path": path, what: key} for key, own in columns.items() for path in own)
    else:
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _is_column(value: Any) -> bool:
    """Whether a value may be a column: a list, or what pandas writes, an object from row number to value."""
    return bool(value) and (isinstance(value, list) or (isinstance(value, dict) and all(map(str.isdecimal, value))))


def _is_row(item: Any) -> bool:
    """Whether an item of a list is an object, or a list that starts with the name of an image."""
    return isinstance(item, dict) or (isinstance(item, list) and bool(item) and looks_like_image(str(item[0])))


def _datumaro(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Images and their labels in Datumaro's JSON, one of CVAT's exports."""
    categories, items = value.get("categories"), value.get("items")
    if not isinstance(categories, dict) or not isinstance(items, list):
        return None
    names = [one["name"] for one in categories["label"]["labels"]]
    return [
        {
            "path": (item.get("image") or {}).get("path") or item["id"],
            "label": [names[one["label_id"]] for one in item["annotations"] if one["type"] == "label"],
        }
        for item in items
    ]


def _fiftyone(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The label of each image in FiftyOne's JSON: names of classes, and their numbers by image."""
    names, numbers = value.get("classes"), value.get("labels")
    if not isinstance(names, list) or not isinstance(numbers, dict) or len(value) > 2:
        return None
    labels = {path: own if isinstance(own, list) else [own] for path, own in numbers.items()}
    return [
        {"path": path, "label": [names[one] if isinstance(one, int) else one for one in own if one is not None]}
        for path, own in labels.items()
    ]


def _coco(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    names = {item["id"]: str(item["name"]) for item in value.get("categories", ())}
    labels: dict[Any, list[str]] = {}
    for item in value["annotations"]:
        name = names.get(item["category_id"], str(item["category_id"]))
        labels.setdefault(item["image_id"], []).append(name)
    for image in value["images"]:
        yield {**image, "path": image["file_name"], "label": list(dict.fromkeys(labels.get(image["id"], ())))}


def _label_studio(tasks: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Images and what was chosen for them; if several questions were asked, each is a column."""
    chosen = list(map(_chosen, tasks))
    questions = {name for own in chosen for name in own}
    for task, own in zip(tasks, chosen, strict=True):
        data = task["data"]
        path = data.get("image") or next((v for v in data.values() if isinstance(v, str)), None)
        answers = {name: names[0] if len(names) == 1 else names for name, names in own.items()}
        yield {"path": path, **(answers if len(questions) > 1 else {"label": next(iter(own.values()), [])})}


def _chosen(task: Mapping[str, Any]) -> dict[str, list[str]]:
    """The choices by question in the last annotation of a task that was not cancelled."""
    made = [one for one in task.get("annotations") or task.get("completions") or () if not one.get("was_cancelled")]
    found: dict[str, list[str]] = {}
    for result in made[-1]["result"] if made else ():
        if result.get("type") in ("choices", "labels", "taxonomy"):
            names = map(str, result["value"].get("choices", ()))
            found.setdefault(str(result.get("from_name")), []).extend(names)
    return found


def _prodigy(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options that were accepted for an image in Prodigy; with one option alone, that or ``not`` that."""
    label, answer = row.get("accept", row.get("label")), row["answer"]
    refused = None if "accept" in row or answer == "ignore" else f"not {label}"
    return {**{key: row[key] for key in row if key != "answer"}, "label": label if answer == "accept" else refused}


def _cvat(data: bytes) -> Iterator[Mapping[str, Any]]:
    """Images and their tags in "CVAT for images" XML."""
    root = ElementTree.fromstring(data)
    if root.tag != "annotations":
        raise ValueError("not a CVAT export: the root element is not <annotations>")
    if next(root.iter("tag"), None) is None and next(root.iter("image"), ()):
        raise ValueError("it holds boxes or outlines of objects, and no tags of whole images")
    for image in root.iter("image"):
        labels = [tag.get("label") for tag in image.iter("tag")]
        yield {"path": image.get("name"), "label": labels, "split": image.get("subset")}


# ---- Parquet


def _parquet(name: str, data: bytes) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None
    names = class_names_of(table.schema)
    columns = {column: cells_of(table[column], names.get(column)) for column in table.column_names}
    return Table(name, columns, class_columns=tuple(names))


def cells_of(column: Any, names: Sequence[str] | None) -> list[Cell]:
    """An Arrow column as text; class numbers become names if these are known, and None if they are out of range."""

    def cell(value: Any) -> Cell:
        if names is None or isinstance(value, (str, bytes)) or value is None:
            return _cell(value)
        if isinstance(value, list):
            return [text for item in value if isinstance(text := cell(item), str)]
        return names[value] if 0 <= value < len(names) else None

    return [cell(value) for value in column.to_pylist()]


def class_names_of(schema: Any) -> dict[str, list[str]]:
    """Class names by column, as Hugging Face datasets keeps them in the schema; {} if there are none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: list(map(str, kind["names"])) for name, kind in features.items() if kind.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
