"""Settings: commands to use the model and repeat the run, requested and used settings, times and versions."""

from __future__ import annotations

import json
from typing import Any

from topwork.blocks import Beside, Block, Cell, Command, Facts, Fold, Stack, Table, Text
from topwork.report.pictures import Album
from topwork.report.run_data import Record
from topwork.report.sections.data import PART_NAMES
from topwork.settings import fit_command, quote
from topwork.text import decimal, duration, escape

STEP_NAMES = {"scan_and_embed": "read and embed"}


def settings(record: Record, _album: Album) -> list[Block]:
    """Commands first; the details behind folds."""
    if record.is_evaluation:
        return _of_evaluation(record)
    model = str(record.folder / "model")
    requested = Table("Requested and used", ("Setting", "Requested", "Used"), tuple(_requested(record)), heading=False, text_columns=(1, 2))  # fmt: skip
    return [
        *_titled("Predict with this model", f"topwork predict {quote(str(record.folder))} IMAGES --out answers.csv"),
        *_titled("Predict in Python", python_code(model)),
        *_titled("Run it again", repeat_command(record)),
        Fold("Settings: requested and used", [requested]),
        Fold("Time and versions", [Beside(([_times(record)], [_versions(record)])), *_embedded(record), _identity(record)]),
        Fold("settings.json and recipe.json", [
            Command(json.dumps(values, indent=1), name)
            for name, values in (("settings.json", record.settings), ("recipe.json", record.recipe))
        ]),
    ]  # fmt: skip


def _of_evaluation(record: Record) -> list[Block]:
    """The command of ``topwork evaluate --out``."""
    command = record.settings.get("command")
    again = _titled("Run it again", " ".join(quote(str(word)) for word in command)) if command else []
    return [*again, Fold("Time and versions", [Beside(([_times(record)], [_versions(record)])), _identity(record)])]


def _titled(title: str, text: str) -> list[Block]:
    return [Text(title, "small"), Command(text, title)]


def repeat_command(record: Record) -> str:
    """The command that makes the same run in a folder next to this one."""
    path = str(record.settings.get("path", record.manifest.root))
    return fit_command(path, f"{record.folder}-again", record.settings.get("settings", {}))


def python_code(model: str) -> str:
    """How to predict with the model in Python."""
    return (
        "from topwork import Predictor\n\n"
        f"predictor = Predictor({ascii(model) if not model.isprintable() else repr(model)})\n"
        'for answer in predictor.predict(["image.jpg"]):\n'
        "    print(answer.label, answer.probability)"
    )


def _requested(record: Record) -> list[tuple[str, str, str]]:
    """Name, requested, used; a dash if it is not a setting."""
    asked, recipe = record.settings.get("settings", {}), record.recipe
    head, spec = recipe.get("head", {}), recipe.get("preprocessing", {})
    penalty = "" if head.get("penalty") is None else f", regularization {head['penalty']}"
    n_part = {part: int((record.part_of == part).sum()) for part in PART_NAMES}
    given = bool(record.split.get("given"))
    fractions = f"valid {asked['valid_fraction']}, test {asked['test_fraction']}" if "test_fraction" in asked else None
    resize = asked.get("resize", asked.get("fit"))
    rows: list[tuple[str, Any, Any]] = [
        ("Backbone", asked.get("backbone"), f"{recipe.get('backbone')} ({recipe.get('architecture')})"),
        ("Mode", asked.get("mode"), recipe.get("mode")),
        ("Classifier", asked.get("head"), f"{head.get('kind')}: {head.get('candidate')}{penalty}"),
        ("Input size", asked.get("size"), f"{spec.get('width')} × {spec.get('height')} px"),
        ("Resize", resize, f"{spec.get('fit')}, {spec.get('interpolation')}"),
        ("Split", "given by the data" if given else fractions, ", ".join(f"{k} {n:,}" for k, n in n_part.items() if n)),
        ("Class balance", asked.get("balance"), "by class size" if recipe.get("class_weights") else "none"),
        ("Precision", asked.get("precision"), ", ".join(str(recipe[key]) for key in ("precision", "engine") if recipe.get(key))),
        ("Temperature", None, f"{decimal(recipe.get('temperature'))}, fitted on the {recipe.get('temperature_fitted_on', 'train part')}"),
        ("Seed", asked.get("seed"), recipe.get("seed")),
    ]  # fmt: skip
    if record.evaluation.get("n_parameters"):
        trained = f"{record.evaluation['n_trainable']:,} of {record.evaluation['n_parameters']:,}"
        rows.append(("Trained parameters", None, trained))
    return [(name, _shown(asked_for), _shown(used)) for name, asked_for, used in rows]


def _shown(value: Any) -> str:
    return "–" if value in (None, "") else escape(str(value))


def _times(record: Record) -> Table:
    seconds = dict(record.evaluation.get("timing", {}).get("seconds", {}))
    total = seconds.pop("total", None) or sum(seconds.values()) or 1.0
    rows = [
        (STEP_NAMES.get(name, name), Stack((("train", min(1.0, some / total)),)), Cell(duration(some), some))
        for name, some in seconds.items()
    ]
    return Table("Time", ("Step", "", "Time"), (*rows, ("total", Stack(()), Cell(duration(total), total, "strong"))))


def _versions(record: Record) -> Table:
    versions = {**record.settings.get("versions", {}), "python": record.settings.get("python", "–")}
    return Table("Versions", ("Package", "Version"), tuple((escape(k), escape(str(v))) for k, v in versions.items()))


def _embedded(record: Record) -> list[Block]:
    timing = record.evaluation.get("timing", {})
    n, rate = timing.get("n_embedded"), timing.get("images_per_second")
    if n is None:
        return []
    if not n:
        return [Text("All features were cached.", "small")]
    speed = f" at {rate:,.0f} images per second" if rate else ""
    return [Text(f"{n:,} images embedded{speed}; the rest were cached.", "small")]


def _identity(record: Record) -> Facts:
    """Names and digests that identify the run."""
    rows = (
        ("Data", record.settings.get("path")),
        ("Run", str(record.folder)),
        ("Started", record.settings.get("started")),
        ("Platform", record.settings.get("platform")),
        ("Images and labels", record.manifest.digest),
        ("Split", record.split.get("digest")),
        ("Backbone weights", record.model.get("weights_digest")),
    )
    return Facts(tuple((name, escape(str(value)), "") for name, value in rows if value), "list")
