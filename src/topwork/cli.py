"""The command line: every command, grouped by task. Only parses arguments and prints results; ``commands/`` does the work.

Exit status: 0 success; 1 failure; 2 usage error; 3 success, but more files were rejected than allowed; 128+n on signal n.
With ``--json``, stdout holds one JSON object and nothing else.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter
from cyclopts.help import DefaultFormatter, HelpPanel
from cyclopts.validators import Number

from topwork import __version__, console
from topwork.console import Terminal, say, wrapped
from topwork.data.remote import check_local, is_url, local_folder, shown, uploaded, work_path
from topwork.errors import Interrupted, TopworkError, UsageError
from topwork.export.targets import TARGETS
from topwork.files import error_reason, writing
from topwork.settings import (
    HERE,
    AdaptSettings,
    ClusterSettings,
    DataSettings,
    FitSettings,
    ModelSettings,
    ScanSettings,
    ServeSettings,
    StudySettings,
    is_launched,
    option_group,
)
from topwork.text import count, escape

TOO_MANY_REJECTS = 3
STDIN = "(stdin)"  # replaces "-", which the parser would read as an option
MANY_OPTIONS = 24  # commands with more show only the everyday ones, unless --help-all is given


class OptionsBySubject(DefaultFormatter):
    """Help with options grouped by subject; for commands with many options, only the everyday ones."""

    show_all = False

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Prints one panel, or one per subject."""
        if panel.format != "parameter" or any(entry.positional_label for entry in panel.entries):
            super().__call__(console, options, panel)
            return
        groups: dict[str, list[Any]] = {}
        for entry in panel.entries:
            title, is_everyday = option_group(entry.positive_names[0])
            if is_everyday or self.show_all or len(panel.entries) <= MANY_OPTIONS:
                # Show only the flag that changes the default; the help describes it.
                is_on = entry.default == "True"
                shown: dict[str, Any] = (
                    {"positive_names": ()} if is_on and entry.negative_names else {"negative_names": ()}
                )
                default = None if entry.default in ("True", "False") else entry.default
                groups.setdefault(title, []).append(entry.copy(default=default, **shown))
        for title, entries in groups.items():
            super().__call__(console, options, panel.copy(title=title, entries=entries))
        n_more = len(panel.entries) - sum(map(len, groups.values()))
        if n_more:
            console.print(f"{n_more} more options: --help-all", highlight=False)


TRAIN = Group("Train", sort_key=1)
UNDERSTAND = Group("Understand", sort_key=2)
USE = Group("Use", sort_key=3)
IMPROVE = Group("Improve", sort_key=4)
LEARN = Group("Learn", sort_key=5)
MANAGE = Group("Manage", sort_key=6)

formatter = OptionsBySubject()
app = App(
    name="topwork",
    version=__version__,
    help=(
        "Train, evaluate and ship image classifiers with transfer learning.\n\n"
        "Get started: topwork fit FOLDER (one folder per class), or topwork app to use the browser."
    ),
    help_format="plaintext",
    help_formatter=formatter,
    result_action="return_value",
)
app.register_install_completion_command(add_to_startup=False, help="Install shell completion.")


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    json: bool = field(default=False, metadata={"help": "Print one JSON object to stdout and nothing else."})
    quiet: bool = field(default=False, metadata={"help": "Hide progress and notes."})
    debug: bool = field(default=False, metadata={"help": "Show the full traceback on errors."})


Flat = Parameter(name="*")
CommonArgs = Annotated[Common, Flat]
IMAGES = "A folder with one subfolder per class or with train/valid/test folders, a CSV or Parquet table, or a tar or zip archive."
MODEL = "A run directory or its model/ folder."
if TYPE_CHECKING:
    FileName = str
else:
    # Parsed as str, the first type; Path enables completion of file names.
    FileName = Annotated[str | Path, Parameter(metavar="PATH")]
Model = Annotated[FileName, Parameter(help=MODEL)]
Labeled = Annotated[FileName, Parameter(help=f"Labeled images. {IMAGES}")]
OtherLabeled = Annotated[FileName | None, Parameter(help=f"Labeled images [default: those of the run]. {IMAGES}")]
Out = Annotated[FileName, Parameter(help="Output directory.")]
NewOut = Annotated[FileName | None, Parameter(help="Output directory [default: runs/NAME, or a new runs/NAME-2, ...].")]
Overwrite = Annotated[bool, Parameter(help="Overwrite --out if it exists.")]
Part = Annotated[
    Literal["auto", "train", "valid", "test", "all"],
    Parameter(help="Part of the data to use. auto: test, else valid, else all."),
]


# ---- train


@app.command(group=TRAIN)
def fit(
    path: Annotated[FileName | None, Parameter(help=IMAGES)] = None,
    /,
    *,
    out: Annotated[
        FileName | None, Parameter(help="Output directory [default: runs/<dataset>, numbered if taken].")
    ] = None,
    resume: Annotated[FileName | None, Parameter(help="Resume this interrupted run with its own settings.")] = None,
    overwrite: Overwrite = False,
    open: Annotated[bool, Parameter(help="Open the report in a browser when done.")] = False,
    dry_run: Annotated[
        bool, Parameter(help="Show how the data would be read (layout, split, classes, first paths), and exit.")
    ] = False,
    settings: Annotated[FitSettings, Flat] = FitSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Train a classifier on the images in PATH, evaluate it on held-out data and write a report."""
    from topwork.commands.fit import fit as fit_run
    from topwork.commands.fit import follow
    from topwork.report.page import prepare
    from topwork.report.run_page import write_report
    from topwork.run import free_run_folder, interrupted

    if resume is not None:
        (path, settings), out, overwrite = interrupted(resume), resume, True
    if path is None:
        raise UsageError("PATH is missing: topwork fit PATH --out RUN (or --resume RUN).")
    if dry_run:
        return _dry_run(path, out, settings, overwrite, common)
    folder = Path(out) if out else free_run_folder(path)
    if is_launched():
        from topwork.training.distributed import processes

        if not processes().is_main:  # only the main process reports and writes
            follow(path, work_path(folder), settings)
            return 0
    threading.Thread(target=prepare, daemon=True).start()
    with Terminal(common.quiet) as terminal, uploaded(out or folder, overwrite=overwrite) as place:
        fitted = fit_run(path, place, settings, overwrite=overwrite, reporter=terminal)
        terminal.step("report")
        report_path = write_report(place)
    fitted, report_path = replace(fitted, folder=folder), folder / report_path.name
    answer = fitted.as_dict() | {"report": shown(report_path), "notes": terminal.notes}
    status = _reject_status(fitted.manifest.n_failed, len(fitted.manifest.samples), settings)
    _show(common, answer, console.fit_lines(fitted))
    if open and not is_url(report_path):
        _browse(report_path.resolve().as_uri())
    return status


@app.command(name="lr-range", group=TRAIN)
def lr_range(
    path: Labeled,
    /,
    *,
    out: Annotated[FileName | None, Parameter(help="Plot to write [default: runs/<dataset>-lr-range.svg].")] = None,
    steps: Annotated[int, Parameter(help="Number of training steps.")] = 100,
    low: Annotated[float, Parameter(help="First learning rate.")] = 1e-6,
    high: Annotated[float, Parameter(help="Last learning rate; stops early if the loss diverges.")] = 1.0,
    settings: Annotated[FitSettings, Flat] = FitSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Run a learning-rate range test and suggest a rate for fit --mode tune. No weights are saved."""
    from topwork.commands.lr_range import lr_range as find_rate
    from topwork.report.other_pages import range_plot
    from topwork.report.page import write_page

    plot = Path(out) if out else Path("runs") / f"{Path(path).resolve().stem or 'data'}-lr-range.svg"
    if plot.suffix != ".svg":
        raise UsageError(f"--out {plot}: must end in .svg.")
    with Terminal(common.quiet) as terminal, uploaded(plot, overwrite=True) as place:
        found = find_rate(path, settings, n_steps=steps, lowest=low, highest=high, reporter=terminal)
        write_page(place, range_plot(found))
    answer = found.as_dict() | {"plot": shown(plot)}
    return _show(common, answer, [*console.range_lines(found), f"Plot: {shown(plot)}"])


@app.command(group=TRAIN)
def models(
    name: Annotated[str | None, Parameter(help="Backbone to describe [default: list the backbones].")] = None,
    /,
    *,
    stages: Annotated[bool, Parameter(help="Show the stages.")] = False,
    filter: Annotated[str, Parameter(help="List timm models that match this pattern, such as '*resnet18*'.")] = "",
    check: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Load and run these backbones; show engine, input size, features, stages, pooling options and speed.",
        ),
    ] = (),
    size: Annotated[int | None, Parameter(help="With --check: input size in pixels.")] = None,
    settings: Annotated[ModelSettings, Flat] = ModelSettings(),
    common: CommonArgs = Common(),
) -> int:
    """List backbones, or describe one: parameters, stages, trainable layers and their learning rates."""
    from topwork.commands.models import check_backbones, describe, listed

    if check:
        with Terminal(common.quiet) as terminal:
            rows = list(check_backbones(check, size, terminal))
        answer, status = {"backbones": [asdict(row) for row in rows]}, int(any(row.problem for row in rows))
        return _show(common, answer, console.checked_lines(rows), status)
    if name is None:
        found = listed(filter)
        return _show(common, found, console.model_list_lines(found, filter))
    described = describe(name, settings)
    return _show(common, described.as_dict(), console.described_lines(described, settings.strategy, stages))


@app.command(group=TRAIN)
def demo(
    folder: Annotated[FileName | None, Parameter(help="Folder for the images [default: in the cache].")] = None,
    /,
    *,
    out: Out = "runs/demo",
    overwrite: Overwrite = False,
    open: Annotated[bool, Parameter(help="Do not open the report in a browser.")] = True,
    seed: Annotated[int, Parameter(help="Random seed.")] = 0,
    common: CommonArgs = Common(),
) -> int:
    """Train on 2,624 images of solar cells and show the report (pip install 'topwork[demo]')."""
    from topwork.commands.demo import LICENSE_NOTE, write_demo_data

    if not common.quiet:
        say(LICENSE_NOTE)
    table_path = write_demo_data(Path(folder) if folder else None, seed)
    return fit(
        str(table_path), out=out, overwrite=overwrite, open=open and not common.json and _has_desktop(),
        settings=FitSettings(seed=seed), common=common,
    )  # fmt: skip


# ---- understand


@app.command(group=UNDERSTAND)
def scan(
    path: Annotated[FileName, Parameter(help=IMAGES)],
    /,
    *,
    report: Annotated[FileName | None, Parameter(help="Also write an HTML report to this file.")] = None,
    settings: Annotated[ScanSettings, Flat] = ScanSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Check a dataset before training: classes, unreadable files, duplicates, leaks, shortcuts, sizes and outliers."""
    from topwork.commands.scan import survey

    with Terminal(common.quiet) as terminal, _page(report, option="--report") as page:
        surveyed = survey(path, settings, reporter=terminal)
        for note in (*surveyed.manifest.notes, *surveyed.findings):
            terminal.note(note)
        if page is not None:
            from topwork.report.page import write_page
            from topwork.report.scan_page import scan_page

            terminal.step("report")
            write_page(page, scan_page(surveyed, settings.augment, settings.seed))
    where = [f"Report: {report}"] if report is not None else []
    answer = {"path": path, **surveyed.as_dict()}
    status = _reject_status(surveyed.manifest.n_failed, len(surveyed.manifest.samples), settings)
    return _show(common, answer, [*console.scan_lines(surveyed), *where], status)


@app.command(group=UNDERSTAND)
def evaluate(
    model: Model,
    path: OtherLabeled = None,
    /,
    *,
    part: Part = "auto",
    by: Annotated[
        Literal["domain", "group", "part"] | None, Parameter(help="Also report results by domain, group or part.")
    ] = None,
    map: Annotated[
        list[str] | None,
        Parameter(help="OLD=NEW: treat class OLD of the data as class NEW of the model. Can be repeated."),
    ] = None,
    out: Annotated[
        FileName | None,
        Parameter(help="Also write a report, the predictions and the confusion matrix to this directory."),
    ] = None,
    overwrite: Overwrite = False,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    cluster: Annotated[ClusterSettings, Flat] = HERE,
    common: CommonArgs = Common(),
) -> int:
    """Evaluate a saved model on labeled images. Classes are matched by name."""
    from topwork.commands.evaluate import evaluate as evaluate_model

    with Terminal(common.quiet) as terminal, _page(out, overwrite=overwrite) as place:
        evaluated = evaluate_model(
            model, path, settings, part=part, by=by, rename=map or (), out=place, overwrite=overwrite, cluster=cluster,
            reporter=terminal,
        )  # fmt: skip
        if place is not None:
            from topwork.report.run_page import write_report

            terminal.step("report")
            write_report(place)
    status = _reject_status(evaluated["n_unused"], evaluated["n"], settings)
    return _show(common, evaluated, console.evaluation_lines(str(path or model), evaluated, out), status)


@app.command(group=UNDERSTAND)
def examine(
    model: Model,
    path: OtherLabeled = None,
    /,
    *,
    out: Annotated[FileName | None, Parameter(help="Page to write [default: RUN/examination.html].")] = None,
    part: Part = "auto",
    n_images: Annotated[int, Parameter(help="Use at most this many images.")] = 200,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Test what a model relies on: re-evaluate it on perturbed images (grayscale, silhouette, masked background, ...)."""
    from topwork.commands.examine import examine_model
    from topwork.models.classifier import find_model
    from topwork.report.examine_page import examine_page
    from topwork.report.page import write_page

    with Terminal(common.quiet) as terminal, _page(out) as place:
        examined = examine_model(model, path, settings, part=part, n_images=n_images, reporter=terminal)
        terminal.step("report")
        final = place or find_model(model).parent / "examination.html"  # in the run folder, or beside a model folder
        write_page(final, examine_page(examined))
    found, page = examined.examination, out or str(final)
    answer = found.as_dict() | {"model": model, "path": examined.path, "page": page}
    return _show(common, answer, [*console.examination_lines(found), f"Page: {page}"])


@app.command(group=UNDERSTAND)
def compare(
    runs: Annotated[list[FileName], Parameter(help="Two or more run directories; each is compared with the first.")],
    /,
    *,
    part: Annotated[
        Literal["auto", "valid", "test"],
        Parameter(help="Part to compare on. auto: test if every run has it, else valid."),
    ] = "auto",
    out: Annotated[FileName | None, Parameter(help="Also write a page with the images on which they disagree.")] = None,
    seed: Annotated[int, Parameter(help="Random seed for the bootstrap.")] = 0,
    common: CommonArgs = Common(),
) -> int:
    """Test whether one run is better than another, with paired tests on the same images."""
    from topwork.commands.compare import compare_runs

    with Terminal(common.quiet) as terminal, _page(out) as page:
        part_name, compared = compare_runs(list(map(str, map(local_folder, runs))), part, seed=seed)
        if page is not None:
            from topwork.report.other_pages import compare_page
            from topwork.report.page import write_page

            terminal.step("report")
            write_page(page, compare_page(part_name, compared))
    lines = [line for found in compared for line in console.comparison_lines(found.sentence, found.as_dict())]
    answer = {"part": part_name, "comparisons": [found.as_dict() for found in compared]}
    return _show(common, answer, [*lines, *([f"Page: {out}"] if out is not None else [])])


@app.command(name="compare-domains", group=UNDERSTAND)
def compare_domains(
    a: Annotated[FileName, Parameter(help="Images of the first domain; without B, data with several domains.")],
    b: Annotated[FileName | None, Parameter(help="Images of the second domain.")] = None,
    /,
    *,
    model: Annotated[FileName | None, Parameter(help="Run trained on A: also estimate its accuracy on B.")] = None,
    out: Annotated[FileName, Parameter(help="Page to write.")] = "domains.html",
    unlabeled: Annotated[bool, Parameter(help="Folder names in B are not labels.")] = False,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Measure the distribution shift between two datasets and estimate the accuracy on the second."""
    from topwork.commands.compare_domains import compare_domains as compare_both
    from topwork.report.other_pages import domains_page
    from topwork.report.page import write_page

    with Terminal(common.quiet) as terminal, uploaded(out, overwrite=True) as page:
        compared = compare_both(a, b, settings, model=model, is_unlabeled=unlabeled, reporter=terminal)
        terminal.step("report")
        write_page(page, domains_page(compared))
    found = [one.as_dict() for one in compared]
    lines = [line for one in found for line in console.domain_lines(one)]
    return _show(common, {"comparisons": found, "page": out}, [*lines, f"Page: {out}"])


@app.command(group=UNDERSTAND)
def report(
    run: Annotated[FileName, Parameter(help="A run directory.")],
    /,
    *,
    format: Annotated[
        Literal["html", "md", "json"], Parameter(help="html: a page; md: text and tables; json: for programs.")
    ] = "html",
    common: CommonArgs = Common(),
) -> int:
    """Regenerate the report of a run, as HTML, Markdown or JSON."""
    from topwork.report.run_page import write_report

    with Terminal(common.quiet) as terminal:
        terminal.step("report")
        folder = local_folder(run)
        path = write_report(folder, format)
    return _show(common, {"run": run, "report": str(path)}, [str(path)])


@app.command(group=UNDERSTAND)
def runs(
    folder: Annotated[FileName, Parameter(help="Folder with run directories.")] = "runs",
    /,
    *,
    common: CommonArgs = Common(),
) -> int:
    """List runs with their results and test which one is best."""
    from topwork.commands.compare import list_runs

    found = list_runs(Path(folder))
    return _show(common, found, console.runs_lines(found))


# ---- use


@app.command(group=USE)
def predict(
    model: Model,
    images: Annotated[
        list[FileName],
        Parameter(help="Files, folders, quoted glob patterns, tar or zip archives, or - to read a list from stdin."),
    ],
    /,
    *,
    out: Annotated[
        FileName | None, Parameter(help="Output file: .csv, .jsonl or .parquet [default: print a table].")
    ] = None,
    top: Annotated[int, Parameter(help="Number of classes per row.", validator=Number(gte=1))] = 5,
    tta: Annotated[bool, Parameter(help="Test-time augmentation with horizontal flip (2x slower).")] = False,
    explain: Annotated[FileName | None, Parameter(help="Save a heatmap per image to this directory.")] = None,
    runtime: Annotated[
        Literal["auto", "openvino", "onnxruntime", "torch"],
        Parameter(help="Inference engine. auto: OpenVINO if installed, else PyTorch."),
    ] = "auto",
    precision: Annotated[
        Literal["f32", "bf16"],
        Parameter(help="bf16 is faster on processors that support it; borderline predictions may change."),
    ] = "f32",
    workers: Annotated[
        int | None, Parameter(help="Threads that decode images [default: one per core].", validator=Number(gte=1))
    ] = None,
    all_probabilities: Annotated[bool, Parameter(help="With --out: write one probability column per class.")] = False,
    csv_safe: Annotated[
        bool, Parameter(help="With --out FILE.csv: prefix cells that a spreadsheet would run as formulas with '.")
    ] = False,
    max_reject_fraction: Annotated[
        float,
        Parameter(help="Exit with status 3 if a larger fraction of the images fails.", validator=Number(gte=0, lte=1)),
    ] = 0.1,
    overwrite: Overwrite = False,
    cluster: Annotated[ClusterSettings, Flat] = HERE,
    common: CommonArgs = Common(),
) -> int:
    """Classify images; one result row per input, including failures."""
    from topwork.export.batch import Layout, check_output, predict_to_file, row_of
    from topwork.export.inputs import list_inputs
    from topwork.export.predictor import Heatmaps, Predictor

    is_stdin = images == [STDIN]
    inputs = list_inputs(sys.stdin.read().splitlines() if is_stdin else images, must_exist=not is_stdin)
    check_output(out, all_probabilities=all_probabilities, csv_safe=csv_safe)
    with Terminal(common.quiet) as terminal:
        terminal.step("predict")
        predictor = Predictor(model, n_top=top, tta=tta, runtime=runtime, precision=precision, cluster=cluster)
        on_row = partial(Heatmaps(predictor).write, Path(explain)) if explain else None
        if out is None:
            predictions = list(predictor.stream(inputs, workers))
            if on_row:
                for number, prediction in enumerate(predictions, start=1):
                    on_row(number, prediction)
        else:
            layout = Layout(top, predictor.classes if all_probabilities else (), csv_safe)
            if all_probabilities:
                predictor.n_top = len(predictor.classes)
            with uploaded(out, overwrite=overwrite) as place:
                counts = predict_to_file(
                    predictor, inputs, place, overwrite, terminal.progress, workers, on_row,
                    layout=layout, max_reject_fraction=max_reject_fraction,
                )  # fmt: skip
    n = len(inputs)
    answer: dict[str, Any]
    if out is None:
        n_errors = sum(p.outcome == "error" for p in predictions)
        rows = [(p.path, p.outcome, p.label or "", p.error or f"{p.probability:.3f}") for p in predictions]
        answer = {"predictions": [row_of(p) for p in predictions]}
        lines = [console.table(rows, ("path", "outcome", "label", "probability"))]
    else:
        n_errors, answer = counts["n_errors"], {"out": out, "n": n, **counts}
        lines = console.prediction_lines(out, n, counts)
    return _show(common, answer, lines, TOO_MANY_REJECTS if n_errors > max_reject_fraction * n else 0)


@app.command(group=USE)
def export(
    model: Model,
    /,
    *,
    out: Annotated[FileName, Parameter(help=f"Output file: {', '.join(t.endings[0] for t in TARGETS.values())}.")],
    to: Annotated[
        str | None,
        Parameter(
            help="; ".join(f"{name}: {target.help}" for name, target in TARGETS.items())
            + " [default: by the ending of --out]."
        ),
    ] = None,
    check: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True, help="Images to verify the export with [default: held-out images of the run]."
        ),
    ] = None,
    int8: Annotated[
        bool,
        Parameter(help="Quantize to 8 bits: a third of the size and usually faster; reports the cost in accuracy."),
    ] = False,
    calibrate: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, help="Calibration images for --int8 [default: training images of the run]."),
    ] = None,
    overwrite: Overwrite = False,
    common: CommonArgs = Common(),
) -> int:
    """Export a model to ONNX, OpenVINO or .pt2, verify its predictions and write a stand-alone predict.py.

    The exported model takes uint8 RGB pixels and returns calibrated
    probabilities. The export fails if its prediction differs from the model's
    on any image it is verified with.
    """
    from topwork.export.package import export_model

    check_local(out)
    with Terminal(common.quiet) as terminal:
        terminal.step("export")
        package = export_model(
            model, to, Path(out), check or (), int8=int8, calibrate=calibrate or (), overwrite=overwrite
        )
    files = {"export": package.exported, "script": package.script, "certificate": package.certificate_path}
    answer = {name: str(path) for name, path in files.items()} | package.certificate.as_dict()
    wrote = f"Wrote {package.exported}, {package.certificate_path} and {package.script} (an example of how to use it)."
    return _show(common, answer, [*console.certificate_lines(package.certificate), wrote])


@app.command(group=USE)
def serve(
    models: Annotated[list[FileName], Parameter(help="Run or model folders, or NAME=FOLDER; /predict uses the first.")],
    /,
    *,
    settings: Annotated[ServeSettings, Flat] = ServeSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Serve models over HTTP (localhost by default): web page, POST /predict, /docs and /metrics."""
    from topwork.export.predictor import Predictor
    from topwork.server.app import named_models, read_token
    from topwork.server.app import serve as serve_models
    from topwork.server.web import is_loopback, open_socket

    with open_socket(settings.host, settings.port) as listener:
        token = read_token(settings, listener)
        predictors = {name: Predictor(folder, n_top=100) for name, folder in named_models(models).items()}
        port = listener.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        lines = [f"Serving {', '.join(predictors)} on http://{host}:{port} (Ctrl+C to stop)"]
        if not is_loopback(listener):
            lines.append(f"Other machines can connect {'with the token' if token else 'without a password'}.")
        _announce(common, {"url": f"http://{host}:{port}", "models": list(predictors)}, *lines)
        serve_models(predictors, settings, listener, token)
    return 0


@app.command(name="app", group=TRAIN)
def start(
    folder: Annotated[FileName, Parameter(help="Folder that holds images/ and runs/.")] = ".",
    /,
    *,
    port: Annotated[int, Parameter(help="Port to listen on; 0 picks a free one.")] = 8002,
    open: Annotated[bool, Parameter(help="Do not open the page in a browser.")] = True,
    common: CommonArgs = Common(),
) -> int:
    """Use topwork in the browser: drop folders of images, train, read the report, try the model, review labels, export.

    Listens on localhost only. Dropped images are stored in images/ and models
    in runs/; all other commands work on the same folders.
    """
    from topwork.server.start import serve_start
    from topwork.server.web import open_socket

    listener = open_socket("127.0.0.1", port)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    _announce(common, {"url": url, "folder": folder}, f"topwork is running at {url} (Ctrl+C to stop)")
    if open and not common.json and _has_desktop():
        threading.Timer(0.5, _browse, (url,)).start()
    serve_start(Path(folder), listener)
    return 0


@app.command(group=USE)
def push(
    model: Model,
    repository: Annotated[str, Parameter(help="Repository, such as user/insects; created if needed.")],
    /,
    *,
    private: Annotated[bool, Parameter(help="Make the repository private if it is created.")] = False,
    common: CommonArgs = Common(),
) -> int:
    """Upload a model folder to the Hugging Face Hub (log in first: hf auth login)."""
    from topwork.export.hub import push as push_model

    pushed = push_model(model, repository, is_private=private)
    return _show(common, asdict(pushed), [f"{pushed.url} (commit {pushed.commit})"])


@app.command(group=USE)
def pull(
    repository: Annotated[str, Parameter(help="Repository, such as user/insects.")],
    /,
    *,
    out: NewOut = None,
    revision: Annotated[str | None, Parameter(help="Branch, tag or commit [default: the main branch].")] = None,
    common: CommonArgs = Common(),
) -> int:
    """Download a model folder from the Hugging Face Hub and verify it."""
    from topwork.export.hub import pull as pull_model

    out = out or _new_folder(repository)
    check_local(out)
    pulled = pull_model(repository, out, revision=revision)
    answer = {"folder": str(pulled.folder), "commit": pulled.commit}
    return _show(common, answer, [f"{pulled.folder} (commit {pulled.commit})"])


# ---- improve


@app.command(group=IMPROVE)
def review(
    run: Annotated[FileName, Parameter(help="A run directory.")],
    /,
    *,
    corrections: Annotated[
        FileName | None,
        Parameter(help="File for the decisions [default: the one the run was trained with, else RUN/corrections.csv]."),
    ] = None,
    port: Annotated[int, Parameter(help="Port to listen on; 0 picks a free one.")] = 8001,
    common: CommonArgs = Common(),
) -> int:
    """Review likely label errors in the browser: keep, relabel or exclude; then retrain and compare.

    Each decision is saved immediately; the images and the run are never
    changed. Listens on localhost only.
    """
    from topwork.commands.review import Review
    from topwork.server.review import serve_review
    from topwork.server.web import open_socket

    reviewed = Review(run, corrections)
    listener = open_socket("127.0.0.1", port)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    tally, file = reviewed.tally(), str(reviewed.journal.path)
    n_likely = sum(doubt.is_confident for doubt in reviewed.doubts)  # those of the report
    likely, rest = count(n_likely, "likely label error"), f"{tally['doubts'] - n_likely:,} less likely"
    lines = [f"{likely} and {rest}: {url} (Ctrl+C to stop)", f"Decisions are saved to {escape(file)}"]
    _announce(common, {"url": url, "corrections": file, **tally}, *lines)
    serve_review(reviewed, listener)
    tally = reviewed.tally()
    if not common.json and not common.quiet and (tally["changed"] or tally["removed"]):
        say(f"{tally['changed']} relabeled, {tally['removed']} excluded. To retrain:")
        say(reviewed.command)
    reviewed.close()
    return 0


@app.command(name="add-class", group=IMPROVE)
def add_class(
    model: Annotated[FileName, Parameter(help="A run directory.")],
    path: Annotated[
        FileName, Parameter(help="A folder with images of one new class, or with one subfolder per new class.")
    ],
    /,
    *,
    out: NewOut = None,
    name: Annotated[str | None, Parameter(help="Name of the new class [default: the name of the folder].")] = None,
    overwrite: Overwrite = False,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Add classes to a trained model without changing its existing ones."""
    from topwork.commands.add_class import add_class as add_class_to
    from topwork.report.run_page import write_report

    out = out or _new_folder(model)
    with Terminal(common.quiet) as terminal, uploaded(out, overwrite=overwrite) as place:
        grown = add_class_to(
            local_folder(model), path, place, settings, name=name, overwrite=overwrite, reporter=terminal
        )
        terminal.step("report")
        write_report(place)
    parts = {key: grown.evaluation.get(key) for key in ("valid", "test", "old_classes", "timing")}
    return _show(common, {"run": out, "added": list(grown.added), **parts}, console.added_lines(grown))


@app.command(group=IMPROVE)
def adapt(
    run: Annotated[FileName, Parameter(help="A run directory.")],
    target: Annotated[
        FileName, Parameter(help="Images of the new domain. Labels are used to evaluate, never to adapt.")
    ],
    /,
    *,
    out: NewOut = None,
    overwrite: Overwrite = False,
    settings: Annotated[AdaptSettings, Flat] = AdaptSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Adapt a model to images that look different (another camera, drawings, X-rays); no labels needed.

    Tries several methods on stored features and selects one with label-free
    checks; if none is clearly better, the model stays unchanged. The new run
    covers both domains.
    """
    from topwork.commands.adapt import adapt as adapt_run
    from topwork.report.run_page import write_report

    out = out or _new_folder(run)
    with Terminal(common.quiet) as terminal, uploaded(out, overwrite=overwrite) as place:
        adapted = adapt_run(local_folder(run), target, place, settings, overwrite=overwrite, reporter=terminal)
        terminal.step("report")
        report_path = write_report(adapted.folder)
    report = Path(out) / report_path.name
    lines = console.adaptation_lines(adapted.record, adapted.evaluation)
    if adapted.ask_path:
        again = f"fill in the column label, then run again with --labels {adapted.ask_path}"
        lines.append(f"To label: {adapted.ask_path} ({again})")
    lines += [f"Model: {Path(out) / 'model'}", f"Report: {report}"]
    answer = adapted.as_dict() | {"report": shown(report), "notes": terminal.notes}
    return _show(common, answer, lines, _reject_status(adapted.n_rejected, adapted.n_used, settings))


# ---- learn


@app.command(group=LEARN)
def study(
    name: Annotated[str | None, Parameter(help="Study to run, such as normalization, scratch or augmentation.")] = None,
    path: Annotated[FileName | None, Parameter(help="Labeled images [default: drawn shapes].")] = None,
    /,
    *,
    list: Annotated[bool, Parameter(help="List the studies.")] = False,
    out: Annotated[FileName, Parameter(help="Output directory.")] = "runs/studies",
    overwrite: Overwrite = False,
    settings: Annotated[StudySettings, Flat] = StudySettings(),
    common: CommonArgs = Common(),
) -> int:
    """Learn transfer learning by running experiments on your own images.

    Get started: topwork study --list, then
    topwork study normalization FOLDER
    """
    from topwork.commands.study import run_study
    from topwork.report.other_pages import write_study
    from topwork.studies.study import STUDIES, study_named

    if list or name is None:
        answer = {"studies": [asdict(known) for known in STUDIES]}
        return _show(common, answer, console.study_list_lines(STUDIES))
    check_local(out)
    found = Path(out) / f"{study_named(name).name}.html"
    if found.exists() and not overwrite:
        raise UsageError(f"--out {out}: {found.name} exists already. Choose another folder, or add --overwrite.")
    with Terminal(common.quiet) as terminal:
        with writing(Path(out)):  # before a study, which takes minutes
            Path(out).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=out).close()
        studied = run_study(name, path, settings, reporter=terminal)
        terminal.step("report")
        page = write_study(studied, Path(out))
    answer = studied.as_dict() | {"page": str(page)}
    return _show(common, answer, [*console.studied_lines(studied), f"Page: {page}"])


# ---- manage


@app.command(group=MANAGE)
def cache(
    *,
    clear: Annotated[bool, Parameter(help="Delete the cached files; they are recomputed when needed.")] = False,
    common: CommonArgs = Common(),
) -> int:
    """Show the size of the cache (features, prepared networks), or clear it."""
    from topwork.commands.cache import cache_contents, clear_cache

    found = clear_cache() if clear else cache_contents()
    return _show(common, found, console.cache_lines(found))


# ---- showing


def _new_folder(name: str) -> str:
    """A new folder below ``runs`` for a model made from another one."""
    from topwork.run import free_run_folder

    return str(free_run_folder(name, Path.exists))


def _page(out: str | None, *, overwrite: bool = True, option: str = "--out") -> AbstractContextManager[Path | None]:
    """The local path of an optional output, uploaded at the end if it is a URL."""
    return nullcontext() if out is None else uploaded(out, overwrite=overwrite, option=option)


def _show(common: Common, answer: Mapping[str, Any], lines: Iterable[str], status: int = 0) -> int:
    """Prints the result as JSON, or the lines; returns the exit status."""
    _print(json.dumps(answer, allow_nan=False) if common.json else wrapped("\n".join(lines), sys.stdout))
    return status


def _announce(common: Common, answer: Mapping[str, Any], *lines: str) -> None:
    """Says where a server listens: JSON to stdout, or lines to stderr."""
    if common.json:
        _print(json.dumps(answer))
    elif not common.quiet:
        say("\n".join(lines))


def _print(text: str) -> None:
    """Prints to stdout and flushes.

    Raises:
        BrokenPipeError: stdout was closed.
        TopworkError: stdout cannot be written, for example on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard_stdout()
        raise
    except OSError as error:
        raise _not_printed(error) from error


def _not_printed(error: OSError) -> TopworkError:
    _discard_stdout()
    return TopworkError(f"stdout: cannot write: {error_reason(error)}.")


def _discard_stdout() -> None:
    """Discards buffered output, so that the interpreter can exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dry_run(path: str, out: str | None, settings: FitSettings, overwrite: bool, common: Common) -> int:
    from topwork.commands.fit import dry_run

    found = dry_run(path, out, settings, overwrite=overwrite)
    lines = [*console.understood_lines(found, with_counts=True), *found.notes, *console.reject_lines(found.rejects)]
    return _show(common, {"path": path, **found.as_dict()}, lines)


def _reject_status(n_rejected: int, n_used: int, settings: DataSettings) -> int:
    return TOO_MANY_REJECTS if n_rejected > settings.max_reject_fraction * (n_rejected + n_used) else 0


def _browse(url: str) -> None:
    import webbrowser

    webbrowser.open(url)


def _has_desktop() -> bool:
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


# ---- the process


def main(tokens: Iterable[str] | None = None) -> None:
    """Runs the command line and exits with the documented status."""
    # Imports create many objects but no garbage; collecting would take a tenth of the time of a short command.
    gc.set_threshold(50_000)
    # Threads of torch that wait for each other soon leave the core to other processes. Two trainings on two cores take
    # 3.4 instead of 6.8 s per step; a single one takes 7% longer (docs/lab-log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = [*(sys.argv[1:] if tokens is None else tokens)]
    formatter.show_all = "--help-all" in arguments
    warnings.filterwarnings(
        "ignore", module="PIL|pydicom"
    )  # about odd metadata; damaged pixels are reported as rejects
    _catch_signals()
    try:
        status = app(plain_tokens(arguments), print_error=False, exit_on_error=False)
    except CycloptsError as error:
        status = _failed(UsageError(_misuse(error)), arguments)
    except Interrupted as interrupted:
        name = signal.Signals(interrupted.signum).name
        say(f"topwork: interrupted ({name}). Progress is saved; run the command again, or use fit --resume.")
        status = 128 + interrupted.signum
    except BrokenPipeError:
        _discard_stdout()
        status = 1
    except Exception as error:  # noqa: BLE001 - the last chance to turn a bug into one line
        status = _failed(error, arguments)
    sys.exit(_flushed(status or 0))


def _misuse(error: CycloptsError) -> str:
    """One line about what is wrong with the arguments."""
    command = " ".join(["topwork", *(error.command_chain or ())])
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        return f"{name} {'needs a value' if name.startswith('--') else 'is missing'} ({command} --help)."
    return f"{error} ({command} --help)"


def plain_tokens(arguments: Sequence[str]) -> list[str]:
    """The arguments in the form the parser takes: ``--ray`` without an address means this machine."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    tokens = [{"-": STDIN, "--help-all": "--help"}.get(token, token) for token in arguments]
    for place, token in enumerate(tokens):
        if token == "--ray" and not re.fullmatch(
            r"auto|local|ray://.+|[\w.-]+:\d+", "".join(tokens[place + 1 : place + 2])
        ):
            tokens[place] = "--ray=local"
    return tokens


def _flushed(status: int) -> int:
    """The status, or 1 if the help could not be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return status or 1
    except OSError as error:
        say(f"topwork: {_not_printed(error)}")
        return status or 1
    return status


def _failed(error: Exception, arguments: Iterable[str]) -> int:
    if "--debug" in arguments:
        raise error
    if isinstance(error, OSError) and error.filename is None and _flushed(0):
        return 1  # reported: the help could not be printed
    known = isinstance(error, TopworkError)
    text = str(error) if known else f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)"
    if isinstance(error, OSError) and not known:
        text = f"{error.filename or 'input/output'}: {error_reason(error)}"
    if "--json" in arguments:
        with suppress(OSError, TopworkError):
            _print(json.dumps({"error": text}))
    say(f"topwork: {text}")
    return error.exit_status if isinstance(error, TopworkError) else 1


def _catch_signals() -> None:
    """The first signal raises an exception, so that everything is closed properly; the second exits immediately."""
    seen: list[int] = []

    def handle(signum: int, _frame: FrameType | None) -> None:
        if seen:
            os._exit(128 + signum)
        seen.append(signum)
        raise Interrupted(signum)

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), handle)


if __name__ == "__main__":
    main()
