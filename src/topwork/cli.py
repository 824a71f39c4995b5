"""The command line: every verb, in the order of the work. Parsing and showing only; the work is below.

Exit status: 0 done; 1 failed; 2 wrong use; 3 done, but more files were rejected than allowed; 128+n on signal n.
With ``--json`` stdout holds one JSON object and nothing else.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from topwork import __version__
from topwork.errors import Interrupted, TopworkError, UsageError
from topwork.settings import (
    AdaptSettings,
    DataSettings,
    FitSettings,
    ModelSettings,
    ScanSettings,
    ServeSettings,
    StudySettings,
    is_launched,
)

TOO_MANY_REJECTS = 3
STDIN = "(stdin)"  # stands for a lone "-", which the parser would take for an option

app = App(
    name="topwork",
    version=__version__,
    help=(
        "From a folder of images to a classifier you can trust.\n\n"
        "Start with: topwork fit FOLDER --out RUN (one folder a class). Then open RUN/report.html."
    ),
    help_format="plaintext",
    result_action="return_value",
)


@dataclass(frozen=True)
class Common:
    """What every verb takes."""

    json: bool = field(default=False, metadata={"help": "Print one JSON object on stdout, nothing else."})
    quiet: bool = field(default=False, metadata={"help": "No progress and no notes on stderr."})
    debug: bool = field(default=False, metadata={"help": "Show the whole traceback of an error."})


Flat = Parameter(name="*")
CommonArgs = Annotated[Common, Flat]


@app.command
def scan(
    path: str,
    /,
    *,
    report: str | None = None,
    settings: Annotated[ScanSettings, Flat] = ScanSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Look at the data before training: classes, rejects, duplicates, leaks, shortcuts, sizes and outliers.

    Parameters
    ----------
    path
        Folder with one folder a class, folder with train/valid/test folders, CSV or Parquet table, tar or zip archive.
    report
        Also write a page with plots and examples to this file.
    """
    from topwork.commands.scan import survey
    from topwork.console import Terminal, overview_lines

    with Terminal(common.quiet) as terminal:
        surveyed = survey(path, settings, reporter=terminal)
        manifest, found = surveyed.manifest, surveyed.overview
        for note in (*manifest.notes, *surveyed.findings):
            terminal.note(note)
        if report is not None:
            from topwork.report.scan_page import write_scan_page

            terminal.step("report")
            write_scan_page(surveyed, Path(report), settings.augment, settings.seed)
        terminal.finish()
    answer = {
        "path": path,
        "layout": manifest.layout,
        "classes": manifest.counts,
        "n_used": len(manifest.samples),
        "n_rejected": len(manifest.rejects),
        "rejects": [asdict(reject) for reject in manifest.rejects],
        "parts": _part_counts(manifest.samples),
        "digest": manifest.digest,
        "notes": list(manifest.notes),
        "findings": list(surveyed.findings),
        **found.as_dict(manifest),
    }
    if common.json:
        _print_json(answer)
    else:
        print("\n".join(overview_lines(found)))
        print(f"\n{len(manifest.samples):,} images used, {len(manifest.rejects):,} files rejected.")
        _print_rejects(manifest.rejects)
        if report is not None:
            print(f"Report: {report}")
    return _reject_status(len(manifest.rejects), len(manifest.samples), settings)


@app.command
def fit(
    path: str | None = None,
    /,
    *,
    out: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    settings: Annotated[FitSettings, Flat] = FitSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Train a classifier on the images below PATH, judge it honestly, and write a run folder with a report.

    Parameters
    ----------
    path
        Folder with one folder a class, folder with train/valid/test folders, or CSV or Parquet table.
    out
        The run folder to make; by default runs/NAME-OF-PATH.
    resume
        Continue the run in this folder with its own settings; needs nothing else.
    overwrite
        Replace the finished run that --out holds.
    """
    from topwork.commands.fit import fit as fit_run
    from topwork.commands.fit import follow
    from topwork.console import Terminal, part_lines
    from topwork.report.page import prepare, write_report
    from topwork.run import resumed

    if resume is not None:
        path, out, settings, finished = resumed(resume)
        if finished:
            raise UsageError(f"{resume}: is finished already; there is nothing to resume.")
    if path is None:
        raise UsageError("fit needs the folder of images: topwork fit PATH --out RUN (or --resume RUN).")
    folder = Path(out) if out else Path("runs") / (Path(path).resolve().stem or "data")
    if is_launched():
        from topwork.training.distributed import processes

        if not processes().is_main:  # the first process reports and writes
            follow(path, folder, settings)
            return 0
    threading.Thread(target=prepare, daemon=True).start()
    with Terminal(common.quiet) as terminal:
        fitted = fit_run(path, folder, settings, overwrite=overwrite, reporter=terminal)
        terminal.step("report")
        report_path = write_report(folder)
        terminal.finish()
    evaluation, manifest = fitted.evaluation, fitted.manifest
    answer = {
        "run": str(folder),
        "valid": evaluation.get("valid"),
        "test": evaluation.get("test"),
        "timing": evaluation["timing"],
        "n_used": len(manifest.samples),
        "n_rejected": len(manifest.rejects),
        "report": str(report_path),
        "notes": terminal.notes,
    }
    if common.json:
        _print_json(answer)
    else:
        chosen = fitted.recipe["head"]
        print(f"{len(manifest.samples):,} images used, {len(manifest.rejects):,} rejected.")
        _print_rejects(manifest.rejects)
        print(f"Head: {chosen['reason']}")
        for name in ("valid", "test"):
            if name in evaluation:
                print("\n".join(part_lines(name, evaluation[name])))
        if "test" not in evaluation:
            print(f"There is no test part. valid: {fitted.recipe['valid_used_for']}.")
        print(f"Took {evaluation['timing']['seconds']['total']:.1f} s. Model: {folder / 'model'}")
        print(f"Report: {report_path}")
    return _reject_status(len(manifest.rejects), len(manifest.samples), settings)


@app.command(name="lr-range")
def lr_range(
    path: str,
    /,
    *,
    out: str | None = None,
    steps: int = 100,
    low: float = 1e-6,
    high: float = 1.0,
    settings: Annotated[FitSettings, Flat] = FitSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Find a learning rate for tuning: raise it from step to step, watch the loss, and suggest one with the reason.

    Takes the options of fit, so that the network, its head and its stages are those that fit --mode tune would train.
    Nothing is trained for keeps: weights and runs are left as they are.

    Parameters
    ----------
    path
        Labeled images, in any form that fit takes.
    out
        The plot to write, an SVG file; by default runs/NAME-OF-PATH-lr-range.svg.
    steps
        Steps of training.
    low
        The rate of the first step.
    high
        The rate of the last step; the test ends earlier when the loss explodes.
    """
    from topwork.commands.lr_range import lr_range as find_rate
    from topwork.console import Terminal, range_lines
    from topwork.report.lr_range_plot import write_range_plot

    plot = Path(out) if out else Path("runs") / f"{Path(path).resolve().stem or 'data'}-lr-range.svg"
    if plot.suffix != ".svg":
        raise UsageError(f"--out {plot}: the plot is an SVG file; give a name that ends in .svg.")
    with Terminal(common.quiet) as terminal:
        found = find_rate(path, settings, n_steps=steps, lowest=low, highest=high, reporter=terminal)
        write_range_plot(found, plot)
        terminal.finish()
    if common.json:
        _print_json(found.as_dict() | {"plot": str(plot)})
    else:
        print("\n".join(range_lines(found)))
        print(f"Plot: {plot}")
    return 0


@app.command
def evaluate(
    model: str,
    path: str,
    /,
    *,
    part: Literal["auto", "train", "valid", "test", "all"] = "auto",
    by: Literal["domain", "group", "part"] | None = None,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Judge a saved model on labeled images. Classes are matched by name.

    Parameters
    ----------
    model
        A run folder or its model/ folder.
    path
        Labeled images, in any form that fit takes.
    part
        Which part, when the data has train/valid/test; auto takes test, else valid, else all.
    by
        Also judge each domain, group or part by itself.
    """
    from topwork.commands.evaluate import evaluate as evaluate_model
    from topwork.console import Terminal, by_lines, part_lines

    with Terminal(common.quiet) as terminal:
        judged = evaluate_model(model, path, settings, part=part, by=by, reporter=terminal)
        terminal.finish()
    if common.json:
        _print_json(judged)
    else:
        print("\n".join([*part_lines(str(path), judged), *by_lines(judged.get("by", {}))]))
    return _reject_status(judged["n_unused"], judged["n"], settings)


@app.command
def predict(
    model: str,
    images: Annotated[
        list[str], Parameter(help="Files, folders, patterns in quotes, tar or zip archives, or - for a list on stdin.")
    ],
    /,
    *,
    out: str | None = None,
    top: int = 5,
    tta: bool = False,
    explain: str | None = None,
    runtime: Literal["auto", "fastest", "openvino", "onnxruntime", "torch"] = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Name what is on each image: one row for each input, errors included, in input order.

    Parameters
    ----------
    model
        A run folder or its model/ folder.
    out
        File to write: .csv, .jsonl or .parquet. Without it the answers are printed.
    top
        How many classes each row names.
    tta
        Also look at each image mirrored and take the mean of the probabilities; twice the work.
    explain
        Folder to make: a picture for each image with where the model looked.
    runtime
        What runs the network. auto: OpenVINO where it is installed, else torch; fastest: measures all that are installed
        on this machine, once a model, and auto takes the winner from then on.
    workers
        Threads that read and decode images; by default one a core.
    overwrite
        Replace the file that --out names.
    seed
        Accepted for uniformity; predicting draws nothing at random.
    """
    from topwork.console import Terminal, table
    from topwork.export.batch import list_inputs, predict_to_file
    from topwork.export.predictor import Predictor

    inputs = list_inputs(sys.stdin.read().splitlines() if images == [STDIN] else images)
    with Terminal(common.quiet) as terminal:
        terminal.step("predict")
        predictor = Predictor(model, n_top=top, tta=tta, runtime=runtime)
        on_row = _picture_writer(predictor, explain) if explain else None
        if out is not None:
            counts = predict_to_file(predictor, inputs, Path(out), overwrite, terminal.progress, workers, on_row)
            terminal.finish()
            if common.json:
                _print_json({"out": out, "n": len(inputs), **counts})
            else:
                print(f"{len(inputs):,} rows in {out}, {counts['n_errors']:,} of them errors.")
            return 0
        predictions = list(predictor.stream(inputs, workers))
        for number, prediction in enumerate(predictions, start=1):
            if on_row:
                on_row(number, prediction)
        terminal.finish()
    if common.json:
        _print_json({"predictions": [asdict(p) | {"top": [list(pair) for pair in p.top]} for p in predictions]})
    else:
        rows = [(p.path, p.outcome, p.label or "", p.error or f"{p.probability:.3f}") for p in predictions]
        print(table(rows, ("path", "outcome", "label", "probability")))
    return 1 if predictions and all(p.outcome == "error" for p in predictions) else 0


@app.command
def export(
    model: str,
    /,
    *,
    to: Literal["onnx", "openvino", "pt2"],
    out: str,
    check: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    int8: bool = False,
    calibrate: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    overwrite: bool = False,
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Write the model as one file for another runtime, with a parity certificate and a stand-alone predict.py.

    The file takes uint8 RGB pixels of the input's size and gives calibrated probabilities. It is run in its own runtime,
    from image files on; if it names another class for any of them, the export fails and names the images.

    Parameters
    ----------
    model
        A run folder or its model/ folder.
    to
        onnx: one self-contained file; openvino: .xml and .bin; pt2: torch.export.
    out
        The file to write: .onnx, .xml or .pt2. The certificate and predict.py come beside it.
    check
        Images, folders or patterns to check with; by default the run's own held-out images.
    int8
        Eight-bit integers inside (onnx and openvino): a third of the size, usually faster. Some answers change; how
        many, and what it costs in accuracy, is measured and printed.
    calibrate
        Images that --int8 measures ranges on; by default training images of the run.
    overwrite
        Replace what is there.
    seed
        Accepted for uniformity; exporting draws nothing at random.
    """
    from topwork.console import Terminal, certificate_lines
    from topwork.export.package import export_model
    from topwork.export.targets import reference_decoder

    with Terminal(common.quiet) as terminal:
        terminal.step("export")
        package = export_model(
            model, to, Path(out), check or (), int8=int8, calibrate=calibrate or (), overwrite=overwrite
        )
        terminal.finish()
    answer = {
        "export": str(package.exported),
        "script": str(package.script),
        "certificate": str(package.certificate_path),
        **package.certificate.as_dict(),
    }
    if common.json:
        _print_json(answer)
    else:
        print("\n".join(certificate_lines(package.certificate)))
        print(f"Wrote {package.exported}, {package.certificate_path} and {package.script}.")
        print(
            f"\nTo use it elsewhere, match this (from {package.script}); the model does the rest:\n\n{reference_decoder()}"
        )
    return 0


@app.command
def serve(
    models: Annotated[list[str], Parameter(help="Run or model folders, or NAME=FOLDER; the first answers /predict.")],
    /,
    *,
    settings: Annotated[ServeSettings, Flat] = ServeSettings(),
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Answer over HTTP, on this machine only unless told otherwise: a page at /, POST /predict, /docs, /metrics.

    SIGINT or SIGTERM ends it once every accepted request has been answered.

    Parameters
    ----------
    seed
        Accepted for uniformity; serving draws nothing at random.
    """
    from topwork.export.predictor import Predictor
    from topwork.server.serve import is_loopback, named_models, open_socket
    from topwork.server.serve import serve as serve_models

    predictors = {name: Predictor(folder, n_top=100) for name, folder in named_models(models).items()}
    listener = open_socket(settings.host, settings.port)
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if common.json:
        _print_json({"url": f"http://{host}:{port}", "models": list(predictors)})
    elif not common.quiet:
        print(f"Serving {', '.join(predictors)} on http://{host}:{port} (Ctrl+C ends it)", file=sys.stderr)
        if not is_loopback(listener):
            print("Other machines can reach it, and there is no password.", file=sys.stderr)
    sys.stdout.flush()
    serve_models(predictors, settings, listener)
    return 0


@app.command
def review(
    run: str,
    /,
    *,
    corrections: str | None = None,
    port: int = 8001,
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Check the labels that a run doubts, in a browser: keep, change or set aside; then fit again and see what it brought.

    Decisions go to a corrections file, at once and for good; images, folders and the run stay as they are. The page
    answers on this machine only. Ctrl+C ends it.

    Parameters
    ----------
    run
        A run folder of topwork fit.
    corrections
        The file of decisions; by default the one the run was fitted with, else corrections.csv in the run. Others use it
        by topwork fit PATH --corrections FILE.
    port
        Port to listen on; 0 takes a free one.
    seed
        Accepted for uniformity; a review draws nothing at random.
    """
    from topwork.commands.review import Review
    from topwork.server.review import serve_review
    from topwork.server.serve import open_socket
    from topwork.text import escape

    reviewed = Review(run, corrections)
    listener = open_socket("127.0.0.1", port)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    tally, file = reviewed.tally(), str(reviewed.journal.path)
    if common.json:
        _print_json({"url": url, "corrections": file, **tally})
    elif not common.quiet:
        print(
            f"{tally['doubts']} labels to check, {tally['open']} of them open: {url} (Ctrl+C ends it)\n"
            f"Decisions go to {escape(file)}",
            file=sys.stderr,
        )
    sys.stdout.flush()
    serve_review(reviewed, listener)
    tally = reviewed.tally()
    if not common.json and not common.quiet and (tally["changed"] or tally["removed"]):
        print(f"{tally['changed']} changed, {tally['removed']} set aside. To fit with them:", file=sys.stderr)
        print(reviewed.command, file=sys.stderr)
    reviewed.close()
    return 0


@app.command
def examine(
    model: str,
    path: str,
    /,
    *,
    out: str | None = None,
    part: Literal["auto", "train", "valid", "test", "all"] = "auto",
    n_images: int = 200,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Find out what a model learned: ask it again without color, shape, middle, surround ... and say what that means.

    Parameters
    ----------
    model
        A run folder or its model/ folder.
    path
        Labeled images, in any form that fit takes.
    out
        The page to write, with pictures; by default examination.html in the run or model folder's parent.
    part
        Which part, when the data has train/valid/test; auto takes test, else valid, else all.
    n_images
        At most this many images, drawn by the seed.
    """
    from topwork.commands.examine import examine_model
    from topwork.console import Terminal, examination_lines
    from topwork.report.examine_page import default_page, write_examine_page

    with Terminal(common.quiet) as terminal:
        examined = examine_model(model, path, settings, part=part, n_images=n_images, reporter=terminal)
        page = Path(out) if out else default_page(model)
        terminal.step("report")
        write_examine_page(examined, page)
        terminal.finish()
    if common.json:
        _print_json(examined.examination.as_dict() | {"model": model, "path": path, "page": str(page)})
    else:
        print("\n".join(examination_lines(examined.examination)))
        print(f"Page: {page}")
    return 0


@app.command
def compare(
    runs: Annotated[list[str], Parameter(help="Run folders; each is compared with the first.")],
    /,
    *,
    part: Literal["auto", "valid", "test"] = "auto",
    out: str | None = None,
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Say whether one run is better than another, from paired tests on the same images.

    Parameters
    ----------
    part
        The part both were judged on; auto takes test where every run has one, else valid.
    out
        Also write a page with the images they disagree on to this file.
    seed
        Of the bootstrap.
    """
    from topwork.commands.compare import compare_runs
    from topwork.console import Terminal, comparison_lines

    part_name, compared = compare_runs(runs, part, seed=seed)
    with Terminal(common.quiet) as terminal:
        if out is not None:
            from topwork.report.compare_page import write_compare_page

            terminal.step("report")
            write_compare_page(part_name, compared, Path(out))
            terminal.finish()
    if common.json:
        _print_json({"part": part_name, "comparisons": [found.as_dict() for found in compared]})
    else:
        for found in compared:
            print("\n".join(comparison_lines(found.sentence, found.as_dict())))
        if out is not None:
            print(f"Page: {out}")
    return 0


@app.command(name="add-class")
def add_class(
    model: str,
    path: str,
    /,
    *,
    out: str,
    name: str | None = None,
    overwrite: bool = False,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Teach a model further classes; the old ones keep their weights, and the old images are not read again.

    Parameters
    ----------
    model
        The run folder that holds the model.
    path
        A folder of images of one new class, or a folder with one folder a class.
    out
        The run folder to make.
    name
        Name of the new class, where there is one; by default that of the folder.
    overwrite
        Replace the finished run that --out holds.
    """
    from topwork.commands.add_class import add_class as add_class_to
    from topwork.console import Terminal, part_lines
    from topwork.report.page import write_report
    from topwork.text import escape, percent_ci

    with Terminal(common.quiet) as terminal:
        grown = add_class_to(model, path, out, settings, name=name, overwrite=overwrite, reporter=terminal)
        terminal.step("report")
        write_report(grown.folder)
        terminal.finish()
    if common.json:
        parts = {key: grown.evaluation.get(key) for key in ("valid", "test", "old_classes", "timing")}
        _print_json({"run": out, "added": list(grown.added), **parts})
        return 0
    print(f"Added {', '.join(escape(label) for label in grown.added)}.")
    if grown.part is not None:
        print(
            f"Old classes, {grown.n_old} {grown.part} images: {percent_ci(grown.before)} before, {percent_ci(grown.after)} after."
        )
    for part in ("valid", "test"):
        if part in grown.evaluation:
            print("\n".join(part_lines(part, grown.evaluation[part])))
    print(f"Model: {Path(out) / 'model'}")
    return 0


@app.command(name="compare-domains")
def compare_domains(
    a: str,
    b: str | None = None,
    /,
    *,
    model: str | None = None,
    out: str | None = None,
    unlabeled: bool = False,
    settings: Annotated[DataSettings, Flat] = DataSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Say how far two sets of images lie apart, which classes move, and what a model will still get right.

    Parameters
    ----------
    a
        Images of the first domain; with a column domain (or --domain-by) and no B, every domain against the first.
    b
        Images of the second domain: any folder, archive or table.
    model
        A run trained on the first domain: its features are compared and its accuracy on the second is predicted.
    out
        The page to write, with pictures of the farthest; by default domains.html.
    unlabeled
        The folders of B are not classes.
    """
    from topwork.commands.compare_domains import compare_domains as compare
    from topwork.console import Terminal, domain_lines
    from topwork.report.domains_page import write_domains_page

    with Terminal(common.quiet) as terminal:
        compared = compare(a, b, settings, model=model, is_unlabeled=unlabeled, reporter=terminal)
        page = Path(out or "domains.html")
        terminal.step("report")
        write_domains_page(compared, page)
        terminal.finish()
    if common.json:
        _print_json({"comparisons": [found.as_dict() for found in compared], "page": str(page)})
    else:
        for found in compared:
            print("\n".join(domain_lines(found.as_dict())))
        print(f"Page: {page}")
    return 0


@app.command
def adapt(
    run: str,
    target: str,
    /,
    *,
    out: str,
    overwrite: bool = False,
    settings: Annotated[AdaptSettings, Flat] = AdaptSettings(),
    common: CommonArgs = Common(),
) -> int:
    """Make a model answer for images that look different: another camera, drawings, X-rays; no label of them is needed.

    Several methods are tried on stored features in seconds, and guard rails choose among them without labels. When they
    are unsure the model stays as it is. The new run knows both domains and reports on both.

    Parameters
    ----------
    run
        The run folder that holds the model.
    target
        Images of the new domain: any folder, archive or table. Class folders are used to report, never to adapt.
    out
        The run folder to make.
    overwrite
        Replace the finished run that --out holds.
    """
    from topwork.commands.adapt import adapt as adapt_run
    from topwork.console import Terminal, adaptation_lines
    from topwork.report.page import write_report

    with Terminal(common.quiet) as terminal:
        adapted = adapt_run(run, target, out, settings, overwrite=overwrite, reporter=terminal)
        terminal.step("report")
        report_path = write_report(adapted.folder)
        terminal.finish()
    evaluation, record = adapted.evaluation, adapted.record
    choice = record["choice"]
    answer = {
        "run": out,
        "outcome": choice["outcome"],
        "method": choice["method"],
        "reason": choice["reason"],
        "domains": evaluation.get("domains"),
        "target": evaluation.get("target"),
        "predicted": record["predicted"],
        "checks": choice["checks"],
        "distance": choice["distance"],
        "n_changed": record["n_changed"],
        "asked": record["asked"],
        "ask": str(adapted.ask_path) if adapted.ask_path else None,
        "timing": evaluation["timing"],
        "report": str(report_path),
        "notes": terminal.notes,
    }
    if common.json:
        _print_json(answer)
    else:
        print("\n".join(adaptation_lines(record, evaluation)))
        if adapted.ask_path:
            print(f"To label: {adapted.ask_path} (fill in the column label, then --labels {adapted.ask_path})")
        print(f"Model: {Path(out) / 'model'}\nReport: {report_path}")
    return _reject_status(adapted.n_rejected, adapted.n_used, settings)


@app.command
def push(
    model: str,
    repository: str,
    /,
    *,
    private: bool = False,
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Upload a model folder to the Hugging Face Hub (log in before with: hf auth login).

    Parameters
    ----------
    model
        A run folder or its model/ folder.
    repository
        Such as user/insects; made if need be.
    private
        Where the repository is made: only you can see it.
    seed
        Accepted for uniformity.
    """
    from topwork.export.hub import push as push_model

    pushed = push_model(model, repository, is_private=private)
    if common.json:
        _print_json(asdict(pushed))
    else:
        print(f"{pushed.url} (commit {pushed.commit})")
    return 0


@app.command
def pull(
    repository: str,
    /,
    *,
    out: str,
    revision: str | None = None,
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Download a model folder from the Hugging Face Hub and check it.

    Parameters
    ----------
    repository
        Such as user/insects.
    out
        The folder to make.
    revision
        Branch, tag or commit; by default the main branch.
    seed
        Accepted for uniformity.
    """
    from topwork.export.hub import pull as pull_model

    pulled = pull_model(repository, out, revision=revision)
    if common.json:
        _print_json({"folder": str(pulled.folder), "commit": pulled.commit})
    else:
        print(f"{pulled.folder} (commit {pulled.commit})")
    return 0


@app.command
def study(
    name: str | None = None,
    path: str | None = None,
    /,
    *,
    list: bool = False,
    out: str = "runs/studies",
    settings: Annotated[StudySettings, Flat] = StudySettings(),
    common: CommonArgs = Common(),
) -> int:
    """Learn transfer learning by running it: one experiment of the tutorials on your own images, with plots and words.

    Start with: topwork study --list. Then: topwork study normalization FOLDER

    Parameters
    ----------
    name
        The study, such as normalization, scratch, rates or augmentation.
    path
        Labeled images, in any form that fit takes; without it shapes are drawn.
    list
        Say what each study teaches, what it costs and where it comes from.
    out
        Folder for the page NAME.html, the numbers NAME.json and the plots.
    """
    from topwork.commands.study import run_study
    from topwork.console import Terminal, studied_lines, study_list_lines
    from topwork.report.study_page import make_folder, write_study
    from topwork.studies.catalog import STUDIES

    if list or name is None:
        if common.json:
            _print_json({"studies": [asdict(known) for known in STUDIES]})
        else:
            print("\n".join(study_list_lines(STUDIES)))
        return 0
    with Terminal(common.quiet) as terminal:
        make_folder(Path(out))
        studied = run_study(name, path, settings, reporter=terminal)
        terminal.step("report")
        page = write_study(studied, Path(out))
        terminal.finish()
    if common.json:
        _print_json(studied.as_dict() | {"page": str(page)})
    else:
        print("\n".join(studied_lines(studied)))
        print(f"Page: {page}")
    return 0


@app.command
def report(
    run: str,
    /,
    *,
    format: Literal["html", "md", "json"] = "html",
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Write RUN/report.html again from what the run holds, or the same as Markdown or JSON.

    Parameters
    ----------
    run
        A run folder that fit made.
    format
        html: the page with pictures; md: text and tables; json: everything for programs.
    seed
        Picks the example images.
    """
    from topwork.console import Terminal
    from topwork.report.markdown import write_plain
    from topwork.report.page import write_report

    with Terminal(common.quiet) as terminal:
        terminal.step("report")
        path = write_report(Path(run)) if format == "html" else write_plain(Path(run), format)
        terminal.finish()
    if common.json:
        _print_json({"run": run, "report": str(path)})
    else:
        print(path)
    return 0


@app.command
def models(
    name: str | None = None,
    /,
    *,
    stages: bool = False,
    filter: str = "",
    settings: Annotated[ModelSettings, Flat] = ModelSettings(),
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """List backbones, or describe one: parameters, stages, which would move and at which rate. Downloads nothing.

    Parameters
    ----------
    name
        A backbone; without it the names are listed.
    stages
        Show the table of stages.
    filter
        List timm's names that match this pattern, such as '*resnet18*'.
    seed
        Accepted for uniformity.
    """
    from topwork.commands.models import describe, listed
    from topwork.console import stage_lines

    if name is None:
        found = listed(filter)
        if common.json:
            _print_json(found)
        else:
            print("Embedded (no network needed): " + ", ".join(found["embedded"]))
            more = "Any timm name works too: topwork models --filter '*resnet18*'"
            print("\n".join(found["timm"]) if filter else more)
        return 0
    described = describe(name, settings)
    if common.json:
        _print_json(described.as_dict())
        return 0
    print(f"{described.name}: {described.architecture}, weights under {described.license or 'no stated license'}")
    print(
        f"{described.n_parameters:,} parameters, {described.n_trainable:,} of them would move (--strategy "
        f"{settings.strategy}); the last layer sees {described.n_features} features"
    )
    if stages:
        print("\n".join(stage_lines([vars(row) for row in described.stages])))
    return 0


@app.command
def demo(
    folder: str | None = None,
    /,
    *,
    out: str | None = None,
    overwrite: bool = False,
    open_report: bool = True,
    seed: int = 0,
    common: CommonArgs = Common(),
) -> int:
    """Train on 2,624 real images of solar cells (needs the demo extra) and show the report.

    Parameters
    ----------
    folder
        Where the images and their table are written; by default a folder in the cache.
    out
        The run folder; by default runs/demo.
    overwrite
        Replace the finished run that --out holds.
    open_report
        Open the report in a browser when there is a desktop.
    seed
        Fixes the split and every other random choice.
    """
    from topwork.commands.demo import LICENSE_NOTE, write_demo_data

    if not common.quiet:
        print(LICENSE_NOTE, file=sys.stderr)
    table_path = write_demo_data(Path(folder) if folder else None, seed)
    run = out or "runs/demo"
    status = fit(str(table_path), out=run, overwrite=overwrite, settings=FitSettings(seed=seed), common=common)
    if open_report and not common.json:
        _open(Path(run) / "report.html")
    return status


def _picture_writer(predictor: Any, folder: str) -> Any:
    """Writes the pictures that predict --explain asks for."""
    from topwork.export.evidence import Evidence

    place, evidence = Path(folder), Evidence(predictor)
    place.mkdir(parents=True, exist_ok=True)
    return lambda number, prediction: evidence.write(number, prediction, place)


# ---- showing


def _print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, allow_nan=False))


def _print_rejects(rejects: Any, n: int = 20) -> None:
    from topwork.text import escape

    for reject in rejects[:n]:
        print(f"  rejected {escape(reject.path)}: {reject.reason}")
    if len(rejects) > n:
        print(f"  ... and {len(rejects) - n:,} more (all with --json, and in manifest.parquet of a run)")


def _part_counts(samples: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in samples:
        if sample.part:
            counts[sample.part] = counts.get(sample.part, 0) + 1
    return counts


def _reject_status(n_rejected: int, n_used: int, settings: DataSettings) -> int:
    return TOO_MANY_REJECTS if n_rejected > settings.max_reject_fraction * (n_rejected + n_used) else 0


def _open(path: Path) -> None:
    """Opens the report where there is a desktop; elsewhere its name has been printed."""
    import webbrowser

    if sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(path.resolve().as_uri())


# ---- the process


def main(tokens: list[str] | None = None) -> None:
    """Runs the command line and ends the process with the promised status."""
    gc.set_threshold(
        50_000
    )  # imports make many objects and no garbage: looking for it costs a tenth of a short command
    arguments = sys.argv[1:] if tokens is None else tokens
    _catch_signals()
    try:
        status = app([STDIN if token == "-" else token for token in arguments])
    except Interrupted as interrupted:
        print(
            f"topwork: ended by {signal.Signals(interrupted.signum).name}; what is done is kept: run it again, or --resume.",
            file=sys.stderr,
        )
        status = 128 + interrupted.signum
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:  # noqa: BLE001 - the last place to turn a bug into one line
        status = _failed(error, arguments)
    sys.exit(status or 0)


def _failed(error: Exception, arguments: list[str]) -> int:
    if "--debug" in arguments:
        raise error
    known = isinstance(error, TopworkError)
    text = str(error) if known else f"unexpected {type(error).__name__}: {error} (--debug shows where)"
    if isinstance(error, OSError) and not known:
        text = f"{error.filename or 'input/output'}: {(error.strerror or str(error)).lower()}"
    if "--json" in arguments:
        _print_json({"error": text})
    print(f"topwork: {text}", file=sys.stderr)
    return error.exit_status if isinstance(error, TopworkError) else 1


def _catch_signals() -> None:
    """First signal: an exception, so that everything is closed properly. Second: the end at once."""
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
