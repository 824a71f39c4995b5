"""Images inside files of data: Parquet, NumPy, and what Hugging Face ``datasets`` saved.

In: a Parquet file with a column of image files, as ``datasets`` writes it; an ``.npz`` file of MedMNIST, Keras, or plain ``X`` and
``y``; or a folder that ``save_to_disk`` wrote, read by that library (extra ``hf``). Out: a :class:`Listing` whose paths are
row numbers (``ROW``, ``ROW/NAME`` or ``PART/ROW``), and the bytes of a row; those of an array are a PNG.

Nothing is unpickled, so CIFAR's batches are not read. Nothing outside the file or folder is opened: an image that is only a path is
named and left out.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.columns import join_labels, listing_of, named_labels, rows_of
from topwork.data.folders import cached_by_version
from topwork.data.layouts import PART_NAMES
from topwork.data.samples import Entry, Listing, Reject, Rules
from topwork.data.tables import Cell, Table, cells_of, class_names_of
from topwork.errors import ImageError, NoLabelColumnError, UsageError
from topwork.text import escape, first_names

if TYPE_CHECKING:
    import pyarrow as pa

_BYTES_NAMES = ("image", "images", "img", "jpg", "jpeg", "png", "picture", "photo", "image_bytes", "bytes")
_IMAGES, _LABELS = ("images", "image", "x", "data", "features"), ("labels", "label", "y", "targets", "target")
_CLASSES = ("class_names", "classes", "label_names", "labels_names", "names")
_PARTS = ("train", "val", "valid", "validation", "test")
_MAX_ARRAY_BYTES = 8 << 30
NO_DATASETS = "saved by Hugging Face datasets, which requires: pip install 'topwork[hf]'"


# ---- Parquet


def holds_images(path: Path) -> bool:
    """Whether a Parquet file has a column with the bytes of image files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return bool(_image_columns(pq.read_schema(path)))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "Parquet", error) from None


def _image_columns(schema: pa.Schema) -> list[str]:
    """The columns of image files: bytes, or, as Hugging Face stores them, bytes with a path."""
    import pyarrow as pa

    found = []
    for field in schema:
        is_struct = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        inner = field.type.field("bytes").type if is_struct else field.type
        is_bytes = pa.types.is_binary(inner) or pa.types.is_large_binary(inner)
        if is_bytes and (is_struct or field.name.lower() in _BYTES_NAMES):
            found.append(str(field.name))
    return found


def list_parquet(path: Path, rules: Rules) -> Listing:
    """The images of a Parquet file; the path of a row is its number, and its own name if it has one.

    Raises:
        UsageError: unreadable, or without a label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        images = _image_columns(file.schema_arrow)
        table = file.read([name for name in file.schema_arrow.names if name not in images])
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "Parquet", error) from None
    rows, notes = _rows_inside(path.name, table, class_names_of(file.schema_arrow), rules)
    return listing_of(path, "table", rows, rules, notes)


def _rows_inside(
    name: str, table: pa.Table, class_names: dict[str, list[str]], rules: Rules
) -> tuple[list[Entry], list[str]]:
    """Rows under their numbers, and sentences on what was assumed about the columns."""
    try:
        columns = {column: cells_of(table[column], class_names.get(column)) for column in table.column_names}
    except (ValueError, TypeError) as error:
        raise UsageError(f"{escape(name)}: cannot be read: {escape(str(error))}.") from None
    own = next((columns.pop(column) for column in list(columns) if column.lower() == "path"), [None] * table.num_rows)
    paths: list[Cell] = [f"{number}/{path}" if path else str(number) for number, path in enumerate(own)]
    return rows_of(Table(name, {"path": paths} | columns, class_columns=tuple(class_names)), None, rules)


def read_parquet_row(root: Path, path: str) -> bytes:
    """The bytes of one image of a Parquet file that holds images."""
    number, starts = int(path.split("/", 1)[0]), _starts(root)
    group = max(index for index, start in enumerate(starts) if start <= number)
    return _image_bytes(_row_group(root, group)[number - starts[group]].as_py())


@cached_by_version(8)
def _starts(root: Path) -> list[int]:
    """Number of the first row of each row group."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(root)
    counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    return [sum(counts[:index]) for index in range(len(counts))]


@cached_by_version(3)
def _row_group(root: Path, group: int) -> Any:
    """The image column of a row group; a few are kept, since neighboring rows are read one after the other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(root)
        column = _image_columns(file.schema_arrow)[0]
        return file.read_row_group(group, columns=[column])[column]
    except (OSError, pa.ArrowException) as error:
        raise ImageError(f"cannot be read from the Parquet file: {str(error).splitlines()[0]}") from None


def _image_bytes(value: Any) -> bytes:
    inner = value.get("bytes") if isinstance(value, dict) else value
    if inner is None:
        # A path in foreign data is not followed: it could lead anywhere.
        raise ImageError("the table has no data for this image")
    return bytes(inner)


def _unreadable(path: Path, kind: str, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"{escape(str(path))}: cannot be read as {kind}: {escape(reason)}.")


# ---- NumPy


def list_arrays(path: Path, rules: Rules) -> Listing:
    """The images of the arrays in a file; ``train_images`` and ``x_train`` name a part, ``images`` and ``X`` all.

    Raises:
        UsageError: unreadable, or without images of a usual shape and as many labels.
    """
    rows: list[Entry] = []
    several, names = 0, _array_names(path)
    for part, (images, labels) in names.items():
        pixels, numbers = _array(path, images), _array(path, labels)
        if pixels.ndim not in (3, 4) or len(pixels) != len(numbers):
            raise UsageError(
                f"{escape(path.name)}: {images} has the shape {pixels.shape} and {labels} {numbers.shape}; "
                "expected (N, H, W) or (N, H, W, channels) and as many labels."
            )
        _brightness(path, images)
        known = {"train": "train", "test": "test"}.get(part, "valid" if part else None)
        for row, own in enumerate(_named(path, _labels_of(numbers), rules)):
            several += len(own) > 1
            rows.append(Entry(f"{part}/{row}" if part else str(row), join_labels(own), known))
    if several and not rules.multi_label:
        raise UsageError(f"{escape(path.name)}: {several:,} images have several labels: add --multi-label.")
    pairs = ", ".join(f"{images} with {labels}" for images, labels in names.values())
    return listing_of(path, "arrays", rows, rules, [f"Read {escape(path.name)}: {pairs}."])


def read_array(root: Path, path: str) -> bytes:
    """One image of a file as PNG."""
    part, _, row = path.rpartition("/")
    try:
        name = _array_names(root)[part][0]
        pixels = _array(root, name)[int(row)]
        black, white = _brightness(root, name)
    except (UsageError, KeyError, IndexError, ValueError):
        raise ImageError("is no longer in the file") from None
    if (black, white) != (0, 255):
        pixels = np.rint((pixels.astype(np.float32) - black) * (255 / (white - black)))
    return _png(pixels.clip(0, 255).astype(np.uint8))


@cached_by_version(8)
def _brightness(path: Path, name: str) -> tuple[int, int]:
    """The values of black and white in an array of images: 0 to 255, 0 to 65535, or, for floats, also 0 to 1 or -1 to 1.

    Raises:
        UsageError: the values lie elsewhere, as after standardizing, so that no brightness is known.
    """
    pixels = _array(path, name)
    if pixels.dtype.kind == "b" or not pixels.size:
        return 0, 1
    low, high = pixels.min(), pixels.max()
    ranges = [(0, 1), (-1, 1), (0, 255), (0, 65535)] if pixels.dtype.kind == "f" else [(0, 255), (0, 65535)]
    for black, white in ranges:
        if pixels.dtype.kind in "iuf" and black <= low and high <= white:
            return black, white
    raise UsageError(
        f"{escape(path.name)}: {escape(name)} has values from {low} to {high} ({pixels.dtype}); expected 0 to 255, 0 to 65535, or "
        "floats from 0 to 1 or -1 to 1."
    )


def _named(path: Path, labels: list[tuple[str, ...]], rules: Rules) -> list[tuple[str, ...]]:
    """Class numbers as names, if the user gave a file of them or the arrays include one."""
    own = next((name for name in _arrays(path).files if name.lower() in _CLASSES), None)
    if own is None or rules.class_names is not None:
        return named_labels(labels, rules)[0]
    names = dict(enumerate(text for (text,) in _labels_of(_array(path, own))))
    if not all(label.isdecimal() and int(label) in names for found in labels for label in found):
        return labels
    return [tuple(names[int(label)] for label in found) for found in labels]


def _array_names(path: Path) -> dict[str, tuple[str, str]]:
    """The names of the arrays of images and of labels, by part; "" for a file without parts."""
    found = _arrays(path).files
    names = {name.lower(): name for name in found}
    pairs: dict[str, tuple[str, str]] = {}
    for part in ("", *_PARTS):
        forms = ("{part}_{name}", "{name}_{part}") if part else ("{name}",)
        wanted = [[form.format(part=part, name=name) for name in kind for form in forms] for kind in (_IMAGES, _LABELS)]
        images, labels = (next((names[one] for one in kind if one in names), None) for kind in wanted)
        if images and labels:
            pairs[part] = (images, labels)
    if not pairs:
        raise UsageError(
            f"{escape(str(path))}: no arrays of images and labels; found: {first_names(found)}. "
            "Expected X and y, images and labels, or train_images, train_labels, val_images, ..."
        )
    return pairs


def _labels_of(numbers: NDArray[Any]) -> list[tuple[str, ...]]:
    """Labels of one number or name each, or of a row of 0 and 1."""
    if numbers.ndim == 2 and numbers.shape[1] > 1:
        return [tuple(str(column) for column in np.flatnonzero(row)) for row in numbers]
    return [(_label_text(value),) for value in numbers.reshape(-1).tolist()]


def _label_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    from PIL import Image

    buffer = io.BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    except (TypeError, ValueError, SystemError):
        raise ImageError(f"an array of the shape {pixels.shape} is no image") from None
    return buffer.getvalue()


@cached_by_version(2)
def _arrays(path: Path) -> Any:
    """The open file; arrays are read when asked for."""
    try:
        with zipfile.ZipFile(path) as file:
            n_bytes = sum(member.file_size for member in file.infolist())
        if n_bytes > _MAX_ARRAY_BYTES:
            raise ValueError(f"its arrays need more than {_MAX_ARRAY_BYTES >> 30} GiB")
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{escape(str(path))}: cannot be read as a NumPy file: {str(error).lower()}.") from None


@cached_by_version(8)
def _array(path: Path, name: str) -> NDArray[Any]:
    try:
        return np.asarray(_arrays(path)[name])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise UsageError(f"{escape(str(path))}: {escape(name)} cannot be read: {str(error).lower()}.") from None


# ---- saved by Hugging Face datasets


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of a Dataset or of a DatasetDict wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def list_saved_dataset(folder: Path, rules: Rules) -> Listing:
    """The images of a saved dataset; splits that are not train, valid or test are named and left out.

    Raises:
        UsageError: damaged, without an image or a label column, or ``datasets`` is not installed.
    """
    rows: list[Entry] = []
    rejects: list[Reject] = []
    for part, data in _saved_parts(folder).items():
        if part and part.lower() not in PART_NAMES:
            rejects.append(Reject(f"{part}/", "a split other than train, valid or test"))
            continue
        image, table = _saved_image_column(folder, data), data.data.table
        left_out = {image, *_image_columns(table.schema)}
        table = table.select([name for name in table.column_names if name not in left_out and name.lower() != "path"])
        names = {name: kind.names for name, kind in data.features.items() if type(kind).__name__ == "ClassLabel"}
        try:
            own, _ = _rows_inside(str(folder / part), table, names, rules)
        except NoLabelColumnError:
            if PART_NAMES.get(part.lower()) not in ("valid", "test"):
                raise
            rejects.append(Reject(f"{part}/", "no column of labels", expected=True))
            continue
        prefix, known = (f"{part}/", PART_NAMES[part.lower()]) if part else ("", None)
        rows += [replace(row, path=f"{prefix}{row.path}", part=row.part or known) for row in own]
    listing = listing_of(folder, "hub", rows, rules)
    return replace(listing, rejects=(*listing.rejects, *rejects))


def read_saved_row(root: Path, path: str) -> bytes:
    """The bytes of one image of a saved dataset."""
    part, _, number = path.rpartition("/")
    data = _saved_parts(root)[part]
    return _image_bytes(data.data.table[_saved_image_column(root, data)][int(number)].as_py())


def _saved_image_column(folder: Path, data: Any) -> str:
    found = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
    if not found:
        raise UsageError(f"{escape(str(folder))}: no image column; found: {first_names(list(data.features))}.")
    return str(found[0])


@cached_by_version(4)
def _saved_parts(folder: Path) -> dict[str, Any]:
    """The splits by name, or the one dataset under ""."""
    _check_names(folder)
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{escape(str(folder))}: {NO_DATASETS}.") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
        parts = {str(name): part for name, part in loaded.items()} if isinstance(loaded, dict) else {"": loaded}
        for part in parts.values():
            part.data.table.validate(full=True)  # offsets of a damaged file could otherwise point outside it
    except Exception as error:  # noqa: BLE001 - raises any exception of its dependencies
        raise _unreadable(folder, "a saved dataset", error) from None
    return parts


def _check_names(folder: Path) -> None:
    """Raises UsageError if a name in the JSON files leads out of the folder."""
    is_dict = (folder / "dataset_dict.json").is_file()
    splits = _json(folder / "dataset_dict.json").get("splits") if is_dict else [""]
    if not isinstance(splits, list) or not all(_is_plain(name) or not is_dict for name in splits):
        raise UsageError(f"{escape(str(folder))}: dataset_dict.json names no splits in this folder.")
    for split in splits:
        files = _json(folder / split / "state.json").get("_data_files")
        names = [item.get("filename") for item in files if isinstance(item, dict)] if isinstance(files, list) else []
        if not names or not all(map(_is_plain, names)):
            raise UsageError(f"{escape(str(folder))}: state.json names no data files in this folder.")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{escape(str(path))}: cannot be read: {str(error).splitlines()[0].lower()}") from None
    return value if isinstance(value, dict) else {}
