"""The demo's data: ELPV, 2,624 images of solar cells, written from its package into a folder with a table.

The table has path, label, split, group and domain. A cell is labeled defective if its annotated probability of a defect
is above one half (Deitsch et al. 2019, arXiv 1807.02894). The split follows the paper: 75% train, 25% test, stratified
by annotation and wafer type.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import shutil
from collections import defaultdict
from pathlib import Path

from topwork.errors import UsageError
from topwork.files import atomic_file, error_reason
from topwork.settings import cache_folder

LICENSE_NOTE = (
    "Demo data: ELPV (Buerhop-Lutz, Deitsch et al.), 2,624 solar cells, license CC BY-NC-SA 4.0: "
    "not for commercial use, share alike, name the authors."
)
TEST_FRACTION = 0.25


def write_demo_data(folder: Path | None = None, seed: int = 0) -> Path:
    """Writes the images and ``elpv.csv``; returns the table's path. Existing files are not changed.

    Raises:
        UsageError: the package with the data is not installed, or the folder cannot be written.
    """
    source = _package_data()
    folder = folder or cache_folder() / "demo"
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows = _rows(source, seed)
        for row in rows:
            target = folder / row["path"]
            if not target.exists():
                with atomic_file(target) as partial:
                    shutil.copyfile(source / row["path"], partial)
        table = folder / "elpv.csv"
        with atomic_file(table) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["path", "label", "split", "domain", "defect_probability"])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UsageError(f"{error.filename or folder}: {error_reason(error)}") from None
    return table


def _package_data() -> Path:
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("The demo data is not installed. Run: pip install 'topwork[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def _rows(source: Path, seed: int) -> list[dict[str, str]]:
    strata: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for line in (source / "labels.csv").read_text().splitlines():
        path, probability, wafer = line.split()
        label = "defective" if float(probability) > 0.5 else "functional"
        row = {"path": path, "label": label, "split": "train", "domain": wafer, "defect_probability": probability}
        strata[(probability, wafer)].append(row)
    for rows in strata.values():
        rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['path']}".encode()).digest())
        for row in rows[: round(TEST_FRACTION * len(rows))]:
            row["split"] = "test"
    return sorted((row for rows in strata.values() for row in rows), key=lambda row: row["path"])
