"""One set of labeled images written in every form that topwork reads, and hostile archives."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Labeled = dict[str, dict[str, bytes]]  # class name -> file name -> bytes


def read_folders(root: Path) -> Labeled:
    """What lies in a folder of class folders."""
    return {
        folder.name: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def folders(images: Labeled, root: Path) -> Path:
    for label, files in images.items():
        (root / label).mkdir(parents=True)
        for name, data in files.items():
            (root / label / name).write_bytes(data)
    return root


def table_rows(images: Labeled, root: Path) -> list[tuple[str, str]]:
    """Writes the files under numbers and returns (path, label) of each."""
    rows = []
    root.mkdir(parents=True)
    for label, files in images.items():
        for data in files.values():
            rows.append((f"{len(rows)}.bin", label))
            (root / rows[-1][0]).write_bytes(data)
    return rows


def csv_table(images: Labeled, root: Path) -> Path:
    rows = table_rows(images, root)
    with open(root / "data.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *reversed(rows)])
    return root / "data.csv"


def parquet_table(images: Labeled, root: Path) -> Path:
    paths, labels = zip(*table_rows(images, root), strict=True)
    pq.write_table(pa.table({"label": labels, "path": paths}), root / "data.parquet")
    return root / "data.parquet"


def embedded_parquet(images: Labeled, root: Path) -> Path:
    root.mkdir(parents=True)
    pq.write_table(hub_table(images), root / "train.parquet", row_group_size=7)
    return root / "train.parquet"


def flat(images: Labeled, root: Path) -> Path:
    """All files in one folder; ``LABEL_NUMBER.bin`` says the class."""
    root.mkdir(parents=True)
    for label, files in images.items():
        for number, data in enumerate(files.values()):
            (root / f"{label}_{number}.bin").write_bytes(data)
    return root


def tar(images: Labeled, root: Path, mode: str = "w", top: str = "") -> Path:
    root.mkdir(parents=True)
    path = root / f"data.tar{mode[1:].replace(':', '.')}"
    with tarfile.open(path, mode) as file:
        for label, files in reversed(images.items()):
            for name, data in files.items():
                add(file, f"{top}{label}/{name}", data)
    return path


def add(file: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    """A member of a tar; ``fields`` such as type and linkname."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    file.addfile(member, io.BytesIO(data))


def zipped(images: Labeled, root: Path) -> Path:
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "data.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for label, files in images.items():
            for name, data in files.items():
                file.writestr(f"data/{label}/{name}", data)
        file.writestr("__MACOSX/data/._x.jpg", b"")
    return root / "data.zip"


def hub_table(images: Labeled) -> pa.Table:
    """As Hugging Face datasets stores images: bytes and a path, class numbers, names in the schema."""
    names = sorted(images)
    rows = [(data, name, names.index(label)) for label, files in images.items() for name, data in files.items()]
    image = pa.array([{"bytes": data, "path": name} for data, name, _ in rows])
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"image": image, "label": [number for *_, number in rows]}).replace_schema_metadata(metadata)


def saved_dataset(images: Labeled, root: Path) -> Path:
    """Written by ``Dataset.save_to_disk``, in two files."""
    _dataset(images).save_to_disk(str(root), num_shards=2)
    return root


def saved_dataset_dict(parts: dict[str, Labeled], root: Path) -> Path:
    """Written by ``DatasetDict.save_to_disk``."""
    import datasets

    datasets.DatasetDict({name: _dataset(images) for name, images in parts.items()}).save_to_disk(str(root))
    return root


def _dataset(images: Labeled) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset(datasets.table.InMemoryTable(hub_table(images)))


LAYOUTS: dict[str, Callable[[Labeled, Path], Path]] = {
    "folders": folders,
    "csv": csv_table,
    "parquet": parquet_table,
    "parquet with images": embedded_parquet,
    "flat": flat,
    "tar": tar,
    "tar in a folder": lambda images, root: tar(images, root, top="./data/"),
    "tar.gz": lambda images, root: tar(images, root, "w:gz"),
    "tar.bz2": lambda images, root: tar(images, root, "w:bz2"),
    "tar.xz": lambda images, root: tar(images, root, "w:xz"),
    "zip": zipped,
    "saved dataset": saved_dataset,
}
