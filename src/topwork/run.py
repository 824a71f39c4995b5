"""The run folder: what is in it, how it is held, written and read again.

``settings.json manifest.parquet split.json recipe.json history.jsonl model/ predictions.parquet evaluation.json
report.html``. Every file is whole or not there; ``evaluation.json`` comes last but for the report, which can always be
made again, so a folder that has it is a finished run. What goes into the folder is decided in ``commands/``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, save_manifest
from topwork.data.shards import read_parquet
from topwork.data.split import Split, split_record
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.predictions import Predictions
from topwork.files import atomic_file
from topwork.models.classifier import Classifier, save_classifier
from topwork.settings import FitSettings, as_dict
from topwork.text import as_text, escape


@contextmanager
def run_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """Holds a run folder: made if needed, refused when it is taken or when another run is writing to it."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        with lock:
            _check_free(folder, overwrite)
            yield
    except filelock.Timeout:
        raise UsageError(f"{folder}: another run is writing here. Wait for it, or choose another --out.") from None
    except OSError as error:
        raise TopworkError(f"{error.filename or folder}: {(error.strerror or str(error)).lower()}") from error
    finally:
        if folder.is_dir() and [p.name for p in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def free_run_folder(path: str | os.PathLike[str]) -> Path:
    """``runs/NAME`` for the images of a path, or ``runs/NAME-2``, ``-3`` ... if that is taken."""
    name = Path(path).resolve().stem or "data"
    folder, number = Path("runs") / name, 2
    while (folder / "evaluation.json").exists() or (folder / "checkpoint").exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def _check_free(folder: Path, overwrite: bool) -> None:
    if (folder / "evaluation.json").exists():
        if not overwrite:
            raise UsageError(f"{folder}: holds a finished run. Choose another --out, or add --overwrite.")
        (folder / "evaluation.json").unlink()
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # of what is replaced: nothing may resume from it
    elif not (folder / "settings.json").exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise UsageError(f"{folder}: holds files that are no run. Choose another --out.")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False))


def write_run(
    folder: Path,
    manifest: Manifest,
    parts: Split,
    classifier: Classifier,
    predictions: Mapping[str, Predictions],
    recipe: dict[str, Any],
    history: Sequence[dict[str, Any]],
    compiled: Path | None,
) -> None:
    """Writes everything but ``settings.json``, which comes first, and ``evaluation.json``, which says that it is done.

    Args:
        compiled: the network in OpenVINO's form, where there is one, to go into the model folder.
    """
    from topwork.export.card import model_card

    save_manifest(manifest, folder / "manifest.parquet")
    write_json(folder / "split.json", split_record(parts, manifest))
    write_json(folder / "recipe.json", recipe)
    with atomic_file(folder / "history.jsonl") as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in history))
    save_predictions(predictions, manifest, folder / "predictions.parquet")
    save_classifier(classifier, folder / "model", compiled, model_card(classifier))


def save_predictions(predictions: Mapping[str, Predictions], manifest: Manifest, path: Path) -> None:
    """One row an image of every part: truth, answer (several labels joined by ``|``), probability and logits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for name, part in predictions.items():
        rows = part.sample_indices.tolist()
        columns = {
            "path": [os.fsencode(manifest.samples[row].path).decode("utf-8", "backslashreplace") for row in rows],
            "part": [name] * len(rows),
            "row": rows,
            "label": [as_text(manifest.samples[row].label) for row in rows],
            "predicted": [as_text(name) for name in part.answers],
            "probability": part.confidence,
            "correct": part.correct,
        }
        flat = pa.array(part.logits.astype(np.float32).reshape(-1))
        table = pa.table(columns)
        tables.append(table.append_column("logits", pa.FixedSizeListArray.from_arrays(flat, len(part.classes))))
    with atomic_file(path) as partial:
        pq.write_table(pa.concat_tables(tables), partial)


def read_logits(path: Path) -> tuple[NDArray[np.int64], NDArray[np.str_], NDArray[np.float32]]:
    """What :func:`save_predictions` wrote: (M,) rows of the manifest, their parts, and (M, C) logits."""
    table = read_parquet(path, ["row", "part", "logits"])
    column = table["logits"].combine_chunks()
    logits = np.asarray(column.flatten()).reshape(len(table), column.type.list_size)
    return table["row"].to_numpy(), np.array(table["part"].to_pylist(), dtype="<U5"), logits


def asked(path: str | os.PathLike[str], settings: FitSettings) -> dict[str, Any]:
    """``settings.json``: enough to repeat or resume the run."""
    return {
        "path": str(Path(path).absolute()),
        "settings": as_dict(settings),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {}
    for name in ("topwork", "torch", "timm", "openvino", "numpy", "pillow", "simplejpeg", "cykooz.resizer"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def resumed(run: str | os.PathLike[str]) -> tuple[str, str, FitSettings, bool]:
    """What an interrupted run was asked: path, folder, settings, and whether it is finished after all."""
    folder = Path(run)
    try:
        asked = json.loads((folder / "settings.json").read_text())
        chosen = {"backbone": asked["backbones"]["name"]} if "backbones" in asked else {}
        settings = FitSettings(**asked["settings"] | chosen)
        return asked["path"], str(folder), settings, (folder / "evaluation.json").exists()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: no run that could be resumed ({error}).") from None


def read_split(folder: Path) -> dict[str, Any]:
    """``split.json`` of a run.

    Raises:
        UsageError: there is none.
        TopworkError: it is damaged.
    """
    return _read_json(folder / "split.json", f"{escape(str(folder))}: no run here (no split.json).")


def read_insights(folder: Path) -> dict[str, Any]:
    """``insights.json`` of a run that was fitted on images with one label each.

    Raises:
        UsageError: there is none.
        TopworkError: it is damaged.
    """
    missing = f"{escape(str(folder))}: has no list of doubtful labels (no insights.json); topwork fit writes one."
    return _read_json(folder / "insights.json", missing)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """``evaluation.json`` of a finished run.

    Raises:
        UsageError: there is no finished run.
        TopworkError: it is damaged.
    """
    return _read_json(
        folder / "evaluation.json",
        f"{escape(str(folder))}: no finished run here (no evaluation.json). topwork fit makes one.",
    )


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        return value
    except FileNotFoundError:
        raise UsageError(missing) from None
    except (OSError, ValueError) as error:
        raise TopworkError(f"{escape(str(path.parent))}: the run is damaged ({error}).") from None
