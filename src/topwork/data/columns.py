"""What the columns of a table mean.

In: a :class:`Table`, the names of the files around it, and the user's :class:`Rules`. Out: rows with a path, a label, and
what else is known, and one sentence on the assumptions. Columns are found by the user's options, else by their usual
names, else by their content.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from topwork.data.layouts import (
    label_taker,
    looks_like_image,
    make_listing,
    merged_forms,
    part_named,
    part_word,
    with_groups,
)
from topwork.data.named_files import Files, located, some_of
from topwork.data.samples import LABEL_SEPARATOR, Entry, Listing, Reject, Rules
from topwork.data.tables import Cell, Table, decoded
from topwork.errors import NoLabelColumnError, UsageError
from topwork.files import error_reason
from topwork.text import count, escape, first_names, natural_key

# Names are compared without case, blanks and punctuation; the order is that of preference.
_PATH_NAMES = (
    "path", "filename", "filepath", "filenames", "filepaths", "file", "files", "fname", "imagepath", "imagename", "imagefile",
    "imagefilename", "image", "images", "imageid", "imageindex", "img", "imgpath", "imgname", "imgid", "idcode", "id", "photo",
    "photoid", "picture", "name", "url",
)  # fmt: skip
_LABEL_NAMES = (
    "label", "labels", "class", "classname", "classlabel", "classes", "category", "categoryname", "categories", "target", "breed",
    "diagnosis", "diagnostic", "dx", "species", "variety", "cultivar", "disease", "findinglabels", "tags", "tag", "choice", "choices", "grade",
    "level", "y", "classid", "labelid", "categoryid", "predictionstring",
)  # fmt: skip
_NAME_NAMES = (
    "labelname", "classname", "categoryname", "labeltext", "labelstr", "name", "class", "category", "species",
)  # fmt: skip
_SPLIT_NAMES = ("split", "part", "partition", "subset", "dataset", "datasplit", "set", "fold")
_GROUP_NAMES = (
    "patient", "patientid", "patientnum", "subject", "subjectid", "case", "caseid", "lesion", "lesionid", "individual", "individualid", "animalid",
    "plantid", "session", "sessionid", "sequence", "sequenceid", "seqid", "video", "videoid", "sceneid", "slideid",
)  # fmt: skip
_FLAGS = {
    **dict.fromkeys(("isvalid", "isval", "isvalidation"), ("valid", "train")),
    "istest": ("test", "train"),
    **dict.fromkeys(("istrain", "istraining", "istrainingimage"), ("train", "test")),
}  # the part of rows with a true value and of the others
_TRUE, _FALSE = {"1", "1.0", "true", "yes", "y", "t", "x"}, {"0", "0.0", "-1", "-1.0", "false", "no", "n", "f", ""}
NUMBERED_PARTS = {"0": "train", "1": "valid", "2": "test"}
_NUMBERED_LABELS = re.compile("(labels?|class|category|tag|target|finding|disease|species)[0-9]+")
_CLASS_FILES = re.compile(r"(class|label|name|synset|categor).*\.(txt|names|json)$|\.names$", re.IGNORECASE)
_BOXES = re.compile(
    r"(?:\S+(?: +-?\d+(?:\.\d+)?){4,5}(?: +|$))+"
)  # ImageNet's PredictionString: each a class and its box, perhaps with a confidence
_LONGEST_PATH, _LONGEST_LABEL = 4096, 1000
_MANY_COLUMNS = 100
_LONGEST_NUMBER = 7  # digits of a class
GUESSED = " (by its content; else: --label-column)"


@dataclass(frozen=True)
class _Meaning:
    """Which column says what.

    Attributes:
        further: columns with additional labels, such as ``label2`` and ``label3`` next to ``label1``.
        one_hot: columns of 0 and 1 whose names are the classes.
        is_guess: the label was found by its content, among several columns.
    """

    path: str
    label: str | None
    further: tuple[str, ...] = ()
    one_hot: tuple[str, ...] = ()
    split: str | None = None
    group: str | None = None
    domain: str | None = None
    is_guess: bool = False


# ---- which column says what


def _meaning_of(table: Table, files: Files | None, rules: Rules) -> _Meaning:
    """Finds the columns; raises UsageError if none or several could be the path or the label."""
    group = _asked(table, rules.group_by, None) if rules.group_by else _first(table, ("group",))
    domain = _first(table, ("domain",))
    path = _asked(table, rules.path_column, "--path-column")
    if path is None:
        path = _path_column(table, files) if files is not None else "path"
    split = _asked(table, rules.split_column, "--split-column") or _split_column(table, path, rules)
    rest = [name for name in table.columns if name not in (path, split, group, domain)]
    marked = [name for name in table.class_columns if name in rest]
    label = _asked(table, rules.label_column, "--label-column") or _first(table, _LABEL_NAMES, rest)
    if label is None and len(marked) == 1:
        label = marked[0]
    is_guess = False
    one_hot = _one_hot(table, rest, rules.multi_label) if label is None else ()
    numbered = _numbered_labels(table, rest, rules) if label is None and not one_hot else []
    if numbered:
        label = numbered[0]
    elif label is None and not one_hot and path is not None and not rules.label_regex:
        label = _label_by_content(table, rest)
        is_guess = label is not None and len(rest) > 1
    missing = [what for what, name in (("path", path), ("label", label or one_hot or rules.label_regex)) if not name]
    if missing and path is None and (own := _pixel_column(table)) is not None:
        raise UsageError(
            f"{escape(table.name)}: the pixels of the images are in the table (column {escape(own)}), which is not read. Save them as .npz "
            "with X (images, height, width) and y (labels)."
        )
    if missing:
        options = " or ".join(f"--{what}-column" for what in missing)
        error = NoLabelColumnError if "label" in missing else UsageError
        raise error(
            f"{escape(table.name)}: no column {' and no column '.join(missing)}; found: "
            f"{first_names(list(table.columns)) or 'none'}. If it has another name, use {options}."
        )
    assert path is not None
    return _Meaning(path, label, tuple(numbered[1:]), one_hot, split, group, domain, is_guess)


def _pixel_column(table: Table) -> str | None:
    """A column of pixels, as in MNIST and FER-2013 in CSV form."""
    found = [
        name for name in table.columns if re.fullmatch(r"pixels?_?\d*|px_?\d+|\d+x\d+|column \d+", name.strip().lower())
    ]
    return found[0] if len(found) > 60 or any(name.strip().lower() == "pixels" for name in found) else None


def _normal(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _asked(table: Table, wanted: str | None, option: str | None) -> str | None:
    """The column that the user named; for ``--group-by``, which may be a pattern as well, None if there is none."""
    if wanted is None:
        return None
    found = next((name for name in table.columns if name.strip().casefold() == wanted.strip().casefold()), None)
    if found is None and option is not None:
        raise UsageError(
            f"{option} {escape(wanted)}: {escape(table.name)} has no such column; found: {first_names(list(table.columns), 12)}."
        )
    return found


def _first(table: Table, names: Sequence[str], among: Sequence[str] | None = None) -> str | None:
    normal = {_normal(name): name for name in reversed(list(among if among is not None else table.columns))}
    return next((normal[name] for name in names if name in normal), None)


def _path_column(table: Table, files: Files) -> str | None:
    def is_file(path: str) -> bool:
        return "." in path and files.exists(path)

    by_name = [name for wanted in _PATH_NAMES for name in table.columns if _normal(name) == wanted]
    others = [name for name in table.columns if name not in by_name]
    for names in (by_name, others):
        for find in (is_file, lambda path: bool(files.named(path))):
            for name in names:
                cells = [cell for cell in some_of(table.columns[name]) if isinstance(cell, str) and cell]
                if cells and 2 * sum(find(cell) for cell in cells) >= len(cells):
                    return name
    endings = [name for name in (*by_name, *others) if _holds_image_names(table.columns[name])]
    if endings:
        return endings[0]
    may_be_folders = [name for name in (*by_name, *others) if _normal(name) not in _LABEL_NAMES]
    folders = (name for name in may_be_folders if files.are_folders(_texts(table.columns[name])))
    return next(folders, next(iter(by_name), None))


def _texts(cells: Sequence[Cell]) -> list[str]:
    return [cell if isinstance(cell, str) else "" for cell in cells]


def _holds_image_names(cells: Sequence[Cell]) -> bool:
    return any(isinstance(cell, str) and looks_like_image(cell) for cell in some_of(cells))


def _split_column(table: Table, path: str | None, rules: Rules) -> str | None:
    for wanted in (*_SPLIT_NAMES, *_FLAGS):
        name = _first(table, (wanted,))
        if name is None or name == path:
            continue
        values = {str(cell).strip().lower() for cell in table.columns[name] if cell}
        is_flag = wanted in _FLAGS and values <= _TRUE | _FALSE
        is_number = {value.removesuffix(".0") for value in values} <= set(NUMBERED_PARTS) and 1 < len(values) < 4
        if not values:
            continue
        if wanted in ("split", "part") or is_flag or (is_number and wanted != "fold") or all(map(part_word, values)):
            return name
    for name, cells in table.columns.items():  # of any other name, if it only says train, valid and test
        found = set(map(part_word, {str(cell) for cell in cells if cell}))
        may_be = name not in (path, rules.label_column) and _normal(name) not in _LABEL_NAMES
        if may_be and len(found) > 1 and None not in found:
            return name
    return None


def _one_hot(table: Table, among: Sequence[str], is_several: bool) -> tuple[str, ...]:
    """The columns of 0 and 1 whose names are the classes; () if there are fewer than two.

    If images have one label but some rows have several 1s, an attribute such as ``male`` may be among them: the only neighboring
    columns with exactly one 1 per row are used.
    """
    found = [name for name in among if _is_binary(table.columns[name]) and _normal(name) not in _FLAGS]
    if len(found) < 2:
        return ()
    marks = np.array([[_is_true(cell) for cell in table.columns[name]] for name in found], np.int64)
    if is_several or len(found) > _MANY_COLUMNS or marks.sum(0).max(initial=0) < 2:
        return tuple(found)
    sums = np.vstack([np.zeros_like(marks[:1]), marks.cumsum(0)])
    runs = [
        (first, last)
        for first in range(len(found))
        for last in range(first + 2, len(found) + 1)
        if (sums[last] - sums[first] == 1).all()
    ]
    return tuple(found[slice(*runs[0])]) if len(runs) == 1 else tuple(found)


def _is_true(cell: Cell) -> bool:
    return str(cell or "").strip().lower() in _TRUE


def _is_binary(cells: Sequence[Cell]) -> bool:
    """Whether a column holds 0 and 1 (or true and false, or -1, 0 and 1), and not only blanks."""
    values = {None if isinstance(cell, list) else (cell or "").strip().lower() for cell in cells}
    return values <= _TRUE | _FALSE and values != {""}


def _label_by_content(table: Table, rest: Sequence[str]) -> str | None:
    """The one column that groups the rows: at least two values, each of them for several rows.

    Raises:
        UsageError: several do.
    """
    found: list[str] = []
    for name in rest:
        if _normal(name) in (*_SPLIT_NAMES, *_GROUP_NAMES):
            continue
        cells = [cell for cell in table.columns[name] if isinstance(cell, str) and cell.strip()]
        values = set(cells)
        if 2 <= len(values) <= max(2, len(cells) / 2) and 2 * len(cells) > table.n_rows and not _are_measures(values):
            found.append(name)
    if len(found) == 2 and _are_names_and_numbers(*(table.columns[name] for name in found)):
        found = [name for name in found if not all(str(cell).isdecimal() for cell in table.columns[name])]
    if len(found) > 1:
        raise UsageError(
            f"{escape(table.name)}: several columns could be the label: {first_names(found, 8)}. Choose one with --label-column."
        )
    return found[0] if found else None


def _are_names_and_numbers(first: Sequence[Cell], second: Sequence[Cell]) -> bool:
    """Whether two columns say the same, one of them in numbers."""
    pairs = {(str(one), str(other)) for one, other in zip(first, second, strict=True)}
    firsts, seconds = {one for one, _ in pairs}, {other for _, other in pairs}
    n_numbers = all(map(str.isdecimal, firsts)) + all(map(str.isdecimal, seconds))
    return len(pairs) == len(firsts) == len(seconds) and n_numbers == 1


def _are_measures(values: Iterable[str]) -> bool:
    """Whether most values are fractions or dates, so that they name no classes."""
    found = [bool(re.fullmatch(r"-?\d+\.\d*[1-9]\d*|\d{4}-\d\d.*", value)) for value in values]
    return 2 * sum(found) > len(found)


def _numbered_labels(table: Table, rest: Sequence[str], rules: Rules) -> list[str]:
    """Columns ``label1``, ``label2``, ..., each with one label of the image; empty if there are fewer than two.

    Raises:
        UsageError: there are some, but not ``--multi-label``.
    """
    found = [
        name
        for name in rest
        if _NUMBERED_LABELS.fullmatch(_normal(name))
        and not _are_measures(cell for cell in some_of(table.columns[name]) if isinstance(cell, str))
    ]
    if len(found) < 2:
        return []
    if not rules.multi_label:
        raise UsageError(
            f"{escape(table.name)}: several columns of labels: {first_names(found)}. Add --multi-label to use them all, or choose one with "
            "--label-column."
        )
    return found


# ---- rows


def rows_of(table: Table, files: Files | None, rules: Rules) -> tuple[list[Entry], list[str]]:
    """The rows with the files that they name, and sentences on what was assumed. A row that names a folder stands for each image in it.

    Args:
        files: None if the images are in the table itself, so that its column ``path`` names no files.

    Raises:
        UsageError: none or several columns could be the path or the label; an unknown part; several labels for one image
            without ``--multi-label``.
    """
    table = _row_per_image(table, files) if files is not None else table
    meaning = _meaning_of(table, files, rules)
    paths, where = _texts(table.columns[meaning.path]), ""
    are_folders = files is not None and files.are_folders(paths)
    if files is not None and not are_folders:
        paths, where = located(paths, files, table.encoding)
    labels, said = _labels(table, meaning, rules, files)
    parts = _parts(table, meaning)
    are_classes = len(set(labels)) == len(labels)  # if paths are folders
    rows, n_found = [], 0
    for number, (path, own, part) in enumerate(zip(paths, labels, parts, strict=True)):
        group, domain = (_text(table, column, number) for column in (meaning.group, meaning.domain))
        if own and _normal(path) in _PATH_NAMES and _normal(own[0]) in _LABEL_NAMES:
            continue  # a header below another one, or once more
        row = Entry(path, join_labels(own), part, group, domain)
        inside = files.in_folder(path) if files is not None and are_folders else []
        rows += [replace(row, path=name, group=group or (None if are_classes else path)) for name in inside] or [row]
        n_found += len(inside)
    if are_folders:
        where = f" (folders; {count(n_found, 'image')} in them{'' if are_classes else '; those of one folder stay in one part'})"
    read = f"paths from column {escape(meaning.path)}{where}"
    if meaning.label is None and not meaning.one_hot:
        return rows, [f"Read {escape(table.name)}: {read}."]
    encoding = f" as {table.encoding}" if table.encoding not in (None, "utf-8-sig", "utf-8", "UTF-8") else ""
    if encoding and rules.encoding is None and not str(table.encoding).startswith("utf-16"):
        encoding += " (else: --encoding)"
    if meaning.one_hot:
        read += f", classes from {len(meaning.one_hot)} columns of 0 and 1 ({first_names(meaning.one_hot, 3)})"
    else:
        columns = [str(meaning.label), *meaning.further]
        read += f", labels from column{'s' * bool(meaning.further)} {first_names(columns)}{said}{GUESSED * meaning.is_guess}"
    read += f", parts from column {escape(meaning.split)}" if meaning.split else ""
    return rows, [f"Read {escape(table.name)}{encoding}: {read}.", *_group_hint(table, meaning, rules)]


def _row_per_image(table: Table, files: Files) -> Table:
    """A row for each image, if the table is an object from each class to a list of its images."""
    if list(table.columns) != ["path", "label"] or not all(isinstance(cell, list) for cell in table.columns["label"]):
        return table
    rows = [(name, key) for key, own in zip(*table.columns.values(), strict=True) for name in own or ()]
    keys, names = some_of(_texts(table.columns["path"])), some_of([name for name, _ in rows])
    if any(map(files.named, keys)) or 2 * sum(bool(files.named(name)) for name in names) < max(1, len(names)):
        return table
    return replace(table, columns={"path": [name for name, _ in rows], "label": [key for _, key in rows]})


def _group_hint(table: Table, meaning: _Meaning, rules: Rules) -> list[str]:
    """A sentence on the column that names images of the same patient or scene, if the split does not look at it yet."""
    name = _first(table, _GROUP_NAMES)
    if name is None or name == meaning.label or meaning.group or meaning.split or rules.group_by:
        return []
    values = Counter(cell for cell in table.columns[name] if isinstance(cell, str) and cell.strip())
    if not 1 < len(values) < sum(values.values()):
        return []
    return [
        f"Column {escape(name)} has {len(values):,} values in {count(sum(values.values()), 'row')}. To keep images of the same "
        f"{escape(name)} on one side of the split: --group-by {shlex.quote(name)}"
    ]


def _text(table: Table, column: str | None, number: int) -> str | None:
    cell = table.columns[column][number] if column is not None else None
    text = ", ".join(cell) if isinstance(cell, list) else cell
    return (text.strip() or None) if text else None


# ---- labels


def _labels(table: Table, meaning: _Meaning, rules: Rules, files: Files | None) -> tuple[list[tuple[str, ...]], str]:
    """The labels of each row, and a note on how they were read."""
    if meaning.one_hot:
        marked = [
            tuple(name.strip() for name in meaning.one_hot if _is_true(table.columns[name][number]))
            for number in range(table.n_rows)
        ]
        where = f"columns such as {first_names(meaning.one_hot, 2)}"
        _check_single(table, marked, rules, where, ", or choose one column with --label-column")
        return marked, ""
    if meaning.label is None:
        return [()] * table.n_rows, ""
    cells = [_parsed(cell) for cell in table.columns[meaning.label]]
    for name in meaning.further:
        cells = [
            [*_pieces(cell, None), *_pieces(_parsed(more), None)]
            for cell, more in zip(cells, table.columns[name], strict=True)
        ]
    separator, said = _separator(cells, rules)
    split = [
        tuple(dict.fromkeys(piece.strip() for piece in _pieces(cell, separator) if piece.strip())) for cell in cells
    ]
    _check_single(table, split, rules, f"column {escape(meaning.label)}")
    values = Counter(name for own in split for name in own)
    if len(values) > 2 and 2 * len(values) > values.total() and _are_measures(values):
        raise UsageError(
            f"{escape(table.name)}: column {escape(meaning.label)} holds numbers or dates, such as {escape(next(iter(values)))}, most of them "
            "once; topwork learns classes. Choose another column with --label-column, or write ranges in place of the numbers."
        )
    if (column := _column_of_names(table, meaning, split)) is not None:
        names = {own[0]: str(name).strip() for own, name in zip(split, table.columns[column], strict=True) if own}
        return [tuple(names[label] for label in own) for own in split], f" with the names in column {escape(column)}"
    named, source = named_labels(split, rules, files)
    return named, said + source


def _column_of_names(table: Table, meaning: _Meaning, labels: Sequence[tuple[str, ...]]) -> str | None:
    """A column such as ``label_name`` next to class numbers, if names and numbers match one to one."""
    if not all(own and len(own) == 1 and own[0].isdecimal() for own in labels if own):
        return None
    for column, cells in table.columns.items():
        if column in (meaning.label, meaning.path) or _normal(column) not in _NAME_NAMES:
            continue
        pairs = {(own[0], str(name or "").strip()) for own, name in zip(labels, cells, strict=True) if own}
        names = {name for _, name in pairs}
        if len(pairs) == len(names) == len({number for number, _ in pairs}) and all(names):
            return column
    return None


def _parsed(cell: Cell) -> Cell:
    """A list, if the cell holds one in JSON or Python's form; whole numbers without the ``.0`` that programs give them."""
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if _BOXES.fullmatch(text):
        return [word for word in dict.fromkeys(text.split()) if not re.fullmatch(r"-?[\d.]+", word)]
    if text[:1] + text[-1:] in ("[]", "{}"):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(text)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            names = value.get("choices") if isinstance(value, dict) else value  # an object of Label Studio
            if isinstance(names, list):
                return [str(name) for name in names]
        if text[0] == "[":
            return text[1:-1].split(",")  # of MakeSense, without quotes
    return text.partition(".")[0] if re.fullmatch(r"\d+\.0+", text) else text


def _pieces(cell: Cell, separator: str | None) -> list[str]:
    if cell is None:
        return []
    return cell if isinstance(cell, list) else cell.split(separator) if separator else [cell]


def _separator(cells: Sequence[Cell], rules: Rules) -> tuple[str | None, str]:
    """The separator of several labels in one cell, and a note on it."""
    texts = {cell for cell in cells if isinstance(cell, str)}
    if rules.label_separator is not None:
        if not rules.multi_label:
            raise UsageError(f"--label-separator {escape(rules.label_separator)} has no effect without --multi-label.")
        return rules.label_separator, ""
    signs = ("|", ";", ",", "\t", "/", "+", "&", " ")
    likely = next((one for one in signs if _separates(one, texts, rules.multi_label or one in "|;")), None)
    if rules.multi_label and likely is None:
        blanks = [text for text in sorted(texts) if " " in text][:1]
        said = [f", such as {escape(one)!r}, treated as one class each (else: --label-separator ' ')" for one in blanks]
        return None, "".join(said)
    if rules.multi_label:
        return likely, ", separated by " + ("blanks" if likely == " " else repr(likely))
    if likely is None:
        return None, ""
    example = next(text for text in sorted(texts) if likely in text)
    return None, f". Each is treated as one class (if {escape(example)!r} names several, add --multi-label)"


def _separates(sign: str, texts: set[str], is_asked: bool) -> bool:
    """Whether a sign separates labels: it does if its pieces are also found alone or with others.

    With ``--multi-label`` a sign that class names hardly hold needs no such evidence, and for others half of it will do if a
    piece is also a label alone.
    """
    several = [text for text in texts if sign in text.strip()]
    if not several or (is_asked and sign in "|;,\t"):
        return bool(several)
    pieces = Counter(piece.strip() for text in texts for piece in set(text.split(sign)) if piece.strip())
    own = {piece.strip() for text in several for piece in text.split(sign) if piece.strip()}
    n_known = 2 * sum(pieces[piece] > 1 for piece in own)
    return n_known > len(own) or (is_asked and n_known == len(own) and bool(own & texts))


def _check_single(table: Table, labels: Sequence[tuple[str, ...]], rules: Rules, where: str, advice: str = "") -> None:
    """Raises UsageError for several labels of one image without ``--multi-label``."""
    several = [own for own in labels if len(own) > 1]
    if several and not rules.multi_label:
        raise UsageError(
            f"{escape(table.name)}: {where}: {count(len(several), 'row')} of {len(labels):,} "
            f"{'names' if len(several) == 1 else 'name'} several classes, such as {first_names(several[0], 3)}. "
            f"Add --multi-label to train on several labels per image{advice}."
        )


def named_labels(
    labels: list[tuple[str, ...]], rules: Rules, files: Files | None = None
) -> tuple[list[tuple[str, ...]], str]:
    """Class numbers as names, if a file of class names was given or lies next to the table."""
    numbers = {label for own in labels for label in own}
    if not numbers or not all(label.isdecimal() and len(label) < _LONGEST_NUMBER for label in numbers):
        if numbers and rules.class_names is not None:
            raise UsageError(
                f"--class-names {escape(str(rules.class_names))} has no effect: the labels are no numbers, such as "
                f"{first_names(sorted(numbers), 2)}."
            )
        return labels, ""
    for name, data in _class_files(files, rules):
        names = class_names(name, data, numbers)
        if names:
            return [tuple(names[label] for label in own) for own in labels], f" with the names in {escape(name)}"
        if rules.class_names is not None:
            raise UsageError(
                f"--class-names {escape(name)}: has no names for the classes {first_names(sorted(numbers))}."
            )
    return labels, ""


def _class_files(files: Files | None, rules: Rules) -> Iterator[tuple[str, bytes]]:
    """The requested file of class names, or candidates next to the table."""
    if rules.class_names is not None:
        try:
            yield str(rules.class_names), Path(rules.class_names).read_bytes()
        except OSError as error:
            raise UsageError(f"--class-names {escape(str(rules.class_names))}: {error_reason(error)}.") from None
    elif files is not None:
        names = [name for name in files.beside if _CLASS_FILES.search(posixpath.basename(name))]
        yield from ((name, files.read(name)) for name in names)


def class_names(name: str, data: bytes, numbers: set[str]) -> dict[str, str]:
    """The name of each class number; {} if the file does not name them all.

    JSON from number to name or the other way, or a list; or lines of a name, of ``0 name`` or of ``name 0``.
    """
    try:
        text, _ = decoded(name, data)
        pairs = _json_names(json.loads(text)) if name.lower().endswith(".json") else _line_names(text)
    except (UsageError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    names = {number: label for number, label in pairs if label and len(number) < _LONGEST_NUMBER}
    if numbers - set(names) and pairs and numbers <= {str(number + 1) for number in range(len(pairs))}:
        names = {str(int(number) + 1): label for number, label in names.items() if number.isdecimal()}  # counted from 1
    return names if numbers <= set(names) and len(set(names.values())) == len(names) else {}


def _json_names(value: Any) -> list[tuple[str, str]]:
    if isinstance(value, list):
        return [(str(number), str(name)) for number, name in enumerate(value)]
    if all(isinstance(own, dict) for own in value.values()):  # id2label and label2id of a configuration
        return next(map(_json_names, value.values()), [])
    pairs = [(str(key), str(name)) for key, name in value.items()]
    return pairs if all(key.isdecimal() for key, _ in pairs) else [(number, name) for name, number in pairs]


def _line_names(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pattern, number, name in ((r"(\d+)[\s:,]+(\S.*)", 1, 2), (r"(\S.*?)[\s:,]+(\d+)", 2, 1)):
        found = [re.fullmatch(pattern, line) for line in lines]
        if all(found):
            return [(str(int(match[number])), match[name]) for match in found if match]
    return [(str(number), line) for number, line in enumerate(lines)]


# ---- parts


def _parts(table: Table, meaning: _Meaning) -> list[str | None]:
    """The part of each row."""
    if meaning.split is None:
        return [None] * table.n_rows
    cells = [str(cell or "").strip() for cell in table.columns[meaning.split]]
    flag = _FLAGS.get(_normal(meaning.split))
    if flag is not None and {cell.lower() for cell in cells} <= _TRUE | _FALSE:
        return [flag[0] if cell.lower() in _TRUE else flag[1] for cell in cells]
    numbers = {cell: NUMBERED_PARTS.get(cell.removesuffix(".0")) for cell in set(cells)}
    if all(numbers.values()):
        return [numbers[cell] for cell in cells]
    # One look per value, not per row.
    named = {cell: part_named(cell, f"{table.name}, row {cells.index(cell) + 1}") for cell in dict.fromkeys(cells)}
    return [named[cell] for cell in cells]


# ---- the listing


def listing_of(root: Path, layout: str, rows: Iterable[Entry], rules: Rules, notes: Sequence[str] = ()) -> Listing:
    """A listing of rows; rows without a path or a label, and repeated rows, are named."""
    take = label_taker(rules.label_regex) if rules.label_regex is not None else None
    entries: dict[str, Entry] = {}
    rejects: list[Reject] = []
    for row in rows:
        label = (take(row.path) or "") if take else row.label
        if (reason := _unusable(row.path, label, rules)) is not None:
            path = f"{row.path[:100]}…" if len(row.path) > _LONGEST_PATH else row.path
            rejects.append(Reject(path or "(row without a path)", reason))
        elif row.path not in entries:
            entries[row.path] = replace(row, label=label) if take else row
        elif rules.multi_label:
            both = [*entries[row.path].label.split(LABEL_SEPARATOR), *label.split(LABEL_SEPARATOR)]
            entries[row.path] = replace(entries[row.path], label=join_labels(both))
        else:
            first = entries[row.path].label
            reason = "listed twice" if first == label else f"listed twice, also as {escape(first)}"
            rejects.append(Reject(row.path, reason, expected=first == label))
    listing = make_listing(root, layout, entries.values(), rejects, notes)
    return with_groups(listing if rules.multi_label else merged_forms(listing), rules)


def _unusable(path: str, label: str, rules: Rules) -> str | None:
    """Why a row cannot be used."""
    longest = max(map(len, label.split(LABEL_SEPARATOR)))
    if len(path) > _LONGEST_PATH or longest > _LONGEST_LABEL:
        return f"a cell of {max(len(path), longest):,} characters"
    if not path:
        return "no path"
    if not label and rules.label_regex is not None:
        return "the name does not match --label-regex"
    return None if label or rules.multi_label else "no label"


def join_labels(labels: Iterable[str]) -> str:
    """Several labels as one string, independent of their order."""
    labels = tuple(labels)
    if len(labels) > 1 and (wrong := next((label for label in labels if LABEL_SEPARATOR in label), None)) is not None:
        raise UsageError(f"label {escape(wrong)}: {LABEL_SEPARATOR} separates several labels; rename it.")
    return LABEL_SEPARATOR.join(sorted({label for label in labels if label}, key=natural_key))
