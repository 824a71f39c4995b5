"""The run folder: its contents, locking, writing and reading.

``settings.json manifest.parquet split.json recipe.json history.jsonl model/ predictions.parquet evaluation.json
report.html``. Every file is written atomically. ``evaluation.json`` is the last file except the report, which can be
regenerated, so a folder with it is a finished run.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, load_manifest, save_manifest
from topwork.data.remote import absolute, is_url, local_folder, shown, url_of, work_path
from topwork.data.shards import matrix_column, matrix_of, read_parquet, room_for, row_groups
from topwork.data.split import PARTS, Split, n_train_of, recorded_split, split_record
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.metrics import headline
from topwork.evaluation.predictions import Predictions, Task, labels_for
from topwork.files import atomic_file, error_reason, is_partial, locked, remove_partial, replace_folder
from topwork.models.classifier import Classifier, find_model, load_classifier, save_classifier
from topwork.settings import DataSettings, FitSettings
from topwork.text import Described, as_text, escape, percent_ci


@dataclass(frozen=True, eq=False, repr=False)
class Run(Described):
    """A finished run, as values.

    Attributes:
        predictions: by part; only ``train`` was used for training.
        history: one record per epoch of fine-tuning, and one per head tried.
    """

    folder: Path
    manifest: Manifest
    split: Split
    classifier: Classifier
    predictions: Mapping[str, Predictions]
    evaluation: dict[str, Any]
    recipe: dict[str, Any]
    history: Sequence[dict[str, Any]]

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        figures = {
            f"Accuracy ({name})": percent_ci(self.evaluation[name]["accuracy"])
            for name in ("test", "valid")
            if "accuracy" in self.evaluation.get(name, {})
        }
        images = ", ".join(f"{name} {len(rows):,}" for name, rows in self.split.parts().items())
        return {**figures, "Images": images, "Backbone": self.classifier.backbone.name, "Folder": self.folder}

    def predictions_of(self, part: str = "auto") -> Predictions:
        """Predictions of ``test``, ``valid`` or ``train``; ``auto`` is test if there is one, else valid.

        Raises:
            UsageError: the run has no such part.
        """
        if part == "auto":
            part = next((name for name in ("test", "valid") if name in self.predictions), "test")
        if part not in self.predictions:
            raise UsageError(f"{escape(str(self.folder))}: has no predictions for the part {part}.")
        return self.predictions[part]

    def as_dict(self) -> dict[str, Any]:
        """What ``fit --json`` prints."""
        return {
            "run": shown(self.folder),
            "valid": self.evaluation.get("valid"),
            "test": self.evaluation.get("test"),
            **{key: part for key, part in self.evaluation.items() if key.endswith("_without_leaks")},
            "timing": self.evaluation["timing"],
            "n_used": len(self.manifest.samples),
            "n_rejected": len(self.manifest.rejects),
        }


def load_run(path: str | os.PathLike[str]) -> Run:
    """Reads a finished run; no image is read.

    Raises:
        UsageError: there is no finished run.
        TopworkError: it is damaged.
    """
    import pyarrow as pa

    folder = local_folder(path)
    evaluation, record, classifier = (
        read_evaluation(folder),
        read_split(folder),
        load_classifier(folder, multi_label=True),
    )
    try:
        recipe, history = read_recipe(folder)
        manifest = load_manifest(folder / "manifest.parquet").named_like(classifier.classes)
        parts = recorded_split(record, manifest)
        truth = labels_for(classifier, manifest)
        rows, names, logits = read_logits(folder / "predictions.parquet")
        predictions = {
            name: Predictions(classifier.classes, rows[own], truth[rows[own]], logits[own], Task.of(classifier))
            for name in PARTS
            if (own := names == name).any()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException) as error:
        raise TopworkError(f"{escape(str(folder))}: the run is damaged ({type(error).__name__}: {error}).") from error
    return Run(folder, manifest, parts, classifier, predictions, evaluation, recipe, history)


@contextmanager
def run_folder(folder: Path, overwrite: bool, asked: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Locks a run folder and yields the folder to write to.

    That is ``folder`` itself, or, if a finished run is to be overwritten, ``NAME.new`` next to it, which replaces the
    old run once it is complete.

    Args:
        asked: ``path`` and ``settings`` of the run; an interrupted run with the same ones is continued.

    Raises:
        UsageError: the folder holds a finished run, an interrupted run with other settings, or other files; or another
            process is writing there.
        TopworkError: it cannot be written.
    """
    if is_url(folder):
        raise UsageError(f"{escape(url_of(folder))}: a run is written to a local folder; topwork --out uploads it.")
    with locked(folder):
        work = check_free(folder, overwrite, asked)
        try:
            work.mkdir(exist_ok=True)
            remove_partial(work)
            yield work
            if work != folder:
                replace_folder(work, folder)
        except UsageError:
            if not (work / "checkpoint").exists():  # nothing to resume
                (work / "settings.json").unlink(missing_ok=True)
            raise
        except OSError as error:
            raise TopworkError(f"{escape(str(error.filename or folder))}: {error_reason(error)}.") from error
        finally:
            with contextlib.suppress(OSError):
                work.rmdir()  # only if nothing was written


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (folder / "evaluation.json").exists()


def replacement_of(folder: Path) -> Path:
    """The temporary folder of a run that replaces a finished one."""
    return folder.with_name(f"{folder.name}.new")


def free_run_folder(
    path: str | os.PathLike[str], is_taken: Callable[[Path], bool] | None = None, within: Path = Path("runs")
) -> Path:
    """``runs/NAME`` for a path, or ``runs/NAME-2``, ``-3`` ... if that is taken: by default, by a finished run."""
    name = Path(path).resolve().stem or "data"
    folder, number = within / name, 2
    while (is_taken or is_finished)(folder):
        folder, number = within / f"{name}-{number}", number + 1
    return folder


def check_free(folder: Path, overwrite: bool, asked: Mapping[str, Any] | None) -> Path:
    """Where a run may be written: the folder itself, or the one that will replace it.

    Raises:
        UsageError: as :func:`run_folder`.
    """
    name = escape(str(folder))
    work = replacement_of(folder) if is_finished(folder) else folder
    if work != folder and not overwrite:
        raise UsageError(f"{name}: contains a finished run. Choose another --out, or add --overwrite.")
    if not work.exists():
        return work
    if not work.is_dir():
        raise UsageError(f"{name}: is a file. Choose another --out.")
    if not (work / "settings.json").exists():
        if not all(is_partial(path) for path in work.iterdir()):
            raise UsageError(f"{name}: contains other files. Choose another --out.")
    elif (work / "checkpoint").exists() and not _is_same_run(work, asked):
        if not overwrite:
            raise UsageError(
                f"{name}: contains an interrupted run with other settings. Continue it with --resume {name}, or start over "
                "with --overwrite."
            )
        shutil.rmtree(work / "checkpoint", ignore_errors=True)  # a replaced run must not be resumed
    return work


def _is_same_run(folder: Path, asked: Mapping[str, Any] | None) -> bool:
    """Whether a run has the same images and settings, so that it can be resumed."""
    try:
        path, settings = read_asked(folder)
    except UsageError:
        return False
    if asked is None or asked["path"] != path:
        return False
    stored = json.loads((folder / "settings.json").read_text())["settings"]
    return asked["settings"] in (stored, asdict(settings))  # as requested, or with the selected backbone


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
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
    """Writes everything except ``settings.json``, which is written first, and ``evaluation.json``, which marks a finished run.

    Args:
        compiled: the compiled OpenVINO network for the model folder, if any.
    """
    from topwork.export.hub import model_card

    save_manifest(manifest, folder / "manifest.parquet")
    write_json(folder / "split.json", split_record(parts, manifest))
    write_json(folder / "recipe.json", recipe)
    with atomic_file(folder / "history.jsonl") as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in history))
    save_predictions(predictions, manifest, folder / "predictions.parquet")
    save_classifier(classifier, folder / "model", compiled, model_card(classifier))


def save_predictions(predictions: Mapping[str, Predictions], manifest: Manifest, path: Path) -> None:
    """One row per image of every part: label, prediction (several labels joined by ``|``), probability and logits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table_of(name: str, part: Predictions) -> pa.Table:
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
        return pa.table({**columns, "logits": matrix_column(part.logits.astype(np.float32))})

    tables = (
        table_of(name, part.take(np.arange(len(part))[some]))
        for name, part in predictions.items()
        for some in part.blocks()
    )
    first = next(tables)
    with atomic_file(path) as partial, pq.ParquetWriter(partial, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


def read_logits(path: Path) -> tuple[NDArray[np.int64], NDArray[np.str_], NDArray[np.float32]]:
    """Reads the file of :func:`save_predictions`: (M,) rows of the manifest, their parts, and (M, C) logits."""
    table = read_parquet(path, ["row", "part"])
    rows, parts = table["row"].to_numpy(), np.array(table["part"].to_pylist(), dtype="<U5")
    logits, done = np.empty((0, 0), np.float32), 0
    for group in row_groups(path, ["logits"]):
        values = matrix_of(group["logits"])
        logits = logits if done else room_for((len(rows), values.shape[1]), np.float32)
        logits[done : done + len(values)] = values
        done += len(values)
    return rows, parts, logits


def asked(path: str | os.PathLike[str], settings: DataSettings) -> dict[str, Any]:
    """``settings.json``: enough to repeat or resume the run."""
    return {
        "path": absolute(path),
        "settings": asdict(settings),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@cache
def versions() -> dict[str, str]:
    """Installed versions of packages that affect the results."""
    found = {}
    for name in ("topwork", "torch", "timm", "openvino", "numpy", "pillow", "simplejpeg", "cykooz.resizer"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def interrupted(run: str | os.PathLike[str]) -> tuple[str, FitSettings]:
    """The path of the images and the settings of an interrupted run, to resume it.

    Raises:
        UsageError: there is no interrupted run.
    """
    folder = work_path(run)
    work = replacement_of(folder) if is_finished(folder) else folder
    if work != folder and not work.is_dir():
        raise UsageError(f"{escape(str(folder))}: this run is finished; there is nothing to resume.")
    return read_asked(work)


def read_asked(folder: Path) -> tuple[str, FitSettings]:
    """The path of the images and the settings of a run, with the selected backbone if several were compared.

    Raises:
        UsageError: there is no run.
    """
    try:
        asked = json.loads((folder / "settings.json").read_text())
        chosen = {"backbone": asked["backbones"]["name"]} if "backbones" in asked else {}
        known = {item.name for item in fields(FitSettings)}  # older runs may have removed settings
        values = {name: value for name, value in (asked["settings"] | chosen).items() if name in known}
        return asked["path"], FitSettings(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{escape(str(folder))}: no run here to resume ({error}).") from None


def images_of_run(
    model: str | os.PathLike[str], settings: DataSettings | None = None, verb: str | None = None
) -> Manifest:
    """The images of a run, each with its part in the run's split.

    Args:
        settings: of a command without a PATH.
        verb: the command, if it takes only runs.

    Raises:
        UsageError: the model is not in a run, or a setting only applies to a path.
        TopworkError: the run is damaged.
    """
    if settings is not None:
        others = replace(settings, workers=None, seed=0, max_reject_fraction=0.1)
        if others != replace(DataSettings(), multi_label=settings.multi_label):
            raise UsageError(
                "Data options need a PATH; without one, the images of the run are used as the run read them."
            )
    folder = find_model(model).parent
    if not (folder / "split.json").exists():
        problem = "not a run directory, so a PATH of images is needed, too"
        if verb is not None:
            problem = f"{verb} needs a run directory, because its manifest lists the existing images"
        raise UsageError(f"{escape(str(model))}: {problem}.")
    record, manifest = read_split(folder), load_manifest(folder / "manifest.parquet")
    try:
        parts = {row: name for name, rows in recorded_split(record, manifest).parts().items() for row in rows.tolist()}
    except (KeyError, TypeError) as error:
        raise TopworkError(f"{escape(str(folder))}: the run is damaged (split.json: {error}).") from None
    samples = tuple(replace(sample, part=parts.get(row)) for row, sample in enumerate(manifest.samples))
    return replace(manifest, samples=samples)


def _read_json(name: str, missing: str, folder: Path) -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
        UsageError: there is none.
        TopworkError: it is damaged.
    """
    try:
        value = json.loads((folder / name).read_text())
        if isinstance(value, dict):
            return value
        raise ValueError(f"{name} holds no JSON object")
    except FileNotFoundError:
        raise UsageError(f"{escape(str(folder))}: {missing}") from None
    except (OSError, ValueError) as error:
        raise TopworkError(f"{escape(str(folder))}: the run is damaged ({error}).") from None


read_split = partial(_read_json, "split.json", "no run here (no split.json).")
read_evaluation = partial(
    _read_json, "evaluation.json", "no finished run here (no evaluation.json). topwork fit creates one."
)
read_insights = partial(
    _read_json,
    "insights.json",
    "has no list of likely label errors (no insights.json); topwork fit writes one.",
)


def read_recipe(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``recipe.json``, and the records of ``history.jsonl``.

    Raises:
        TopworkError: missing or damaged.
    """
    try:
        lines = (folder / "history.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise TopworkError(f"{escape(str(folder))}: the run is damaged ({error}).") from None
    return _read_json("recipe.json", "the run is damaged (no recipe.json).", folder), history


def provenance(manifest: Manifest, parts: Split, evaluation: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    """The provenance stored in a model folder."""
    name, part = headline(evaluation) or (None, {})
    kept = ("n", "accuracy", "balanced_accuracy", "mean_average_precision", "micro_f1")
    return {
        "data_digest": manifest.digest,
        "n_train": n_train_of(manifest, parts),
        "judged_on": name,
        "without_leaks": bool(evaluation.get("leaks", {}).get(name)),
        "figures": {key: part[key] for key in kept if key in part} if part else None,
        "outcomes": evaluation[name].get("outcomes") if name else None,
        "seed": settings.seed,
        "versions": versions(),
    }
