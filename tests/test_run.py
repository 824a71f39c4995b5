"""The spine, end to end on drawn images: what is predicted is what was reported, nothing is lost, wrong use is named."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from drawing import draw, draw_folders
from terminal import topwork
from topwork.commands import assess
from topwork.commands.evaluate import evaluate
from topwork.commands.fit import fit
from topwork.data import shards
from topwork.data.split import split_record
from topwork.errors import UsageError
from topwork.evaluation import predictions
from topwork.export.predictor import Predictor
from topwork.features import logistic, probe
from topwork.files import atomic_file, locked
from topwork.report.run_page import write_report
from topwork.run import asked, free_run_folder, load_run, run_folder
from topwork.settings import FitSettings

BACKBONE = "random:test_efficientnet"
SETTINGS = FitSettings(backbone=BACKBONE, near_duplicates=False)
PARTS = replace(SETTINGS, valid_fraction=0.2)  # by default a probe has no valid part
RUN_FILES = {
    "settings.json",
    "manifest.parquet",
    "split.json",
    "recipe.json",
    "history.jsonl",
    "model",
    "predictions.parquet",
    "evaluation.json",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes, hard enough that some answers are wrong."""
    root = draw_folders(tmp_path_factory.mktemp("data"), n_each=30, shapes=("disc", "square", "cross"))
    rng = np.random.default_rng(0)
    for path in sorted(root.glob("*/*.jpg")):
        pixels = np.asarray(Image.open(path)).astype(float)
        gray = pixels.mean(2, keepdims=True).repeat(3, 2) + rng.normal(0, 60, pixels.shape)
        Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8)).save(path, quality=60)
    return root


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    return fit(data, tmp_path_factory.mktemp("runs") / "run", PARTS)


def test_a_run_holds_all_that_is_promised(fitted):
    assert {p.name for p in fitted.folder.iterdir()} >= RUN_FILES
    assert {p.name for p in (fitted.folder / "model").iterdir()} >= {"model.safetensors", "topwork.json", "README.md"}
    evaluation = json.loads((fitted.folder / "evaluation.json").read_text())
    for part in ("valid", "test"):
        keys = {
            "n",
            "accuracy",
            "balanced_accuracy",
            "top5_accuracy",
            "cross_entropy",
            "ece",
            "macro_f1",
            "per_class",
            "confusion",
            "classes",
        }
        assert keys <= evaluation[part].keys()
        assert evaluation[part]["accuracy"]["low"] <= evaluation[part]["accuracy"]["value"]
        assert np.sum(evaluation[part]["confusion"]) == evaluation[part]["n"]
    assert (
        evaluation["n_trainable"] == 3 * (fitted.classifier.backbone.n_features + 1)
        or fitted.classifier.head.kind == "extended"
    )
    assert evaluation["timing"]["n_embedded"] == 90


def test_predicting_gives_exactly_the_reported_accuracy(fitted, data):
    """The files of each part, predicted from the saved folder, against the figures of the run."""
    predictor = Predictor(fitted.folder)
    for part in ("valid", "test"):
        rows = getattr(fitted.split, part)
        samples = [fitted.manifest.samples[row] for row in rows]
        answers = predictor.predict([data / sample.path for sample in samples])
        accuracy = np.mean([a.label == s.label for a, s in zip(answers, samples, strict=True)])
        assert accuracy == fitted.evaluation[part]["accuracy"]["value"]
        reported = fitted.predictions[part].confidence
        np.testing.assert_allclose([a.probability for a in answers], reported, atol=1e-6)


def test_some_answers_are_wrong_or_the_tests_above_show_little(fitted):
    assert any(fitted.evaluation[part]["accuracy"]["value"] < 1 for part in ("valid", "test"))


def test_the_predictions_table_agrees_with_the_figures(fitted):
    table = pq.read_table(fitted.folder / "predictions.parquet").to_pylist()
    test_rows = [row for row in table if row["part"] == "test"]
    assert np.mean([row["correct"] for row in test_rows]) == fitted.evaluation["test"]["accuracy"]["value"]
    assert {row["part"] for row in table} == {"train", "valid", "test"}
    assert len(table) == 90


def test_evaluate_of_the_test_images_alone_gives_the_same_part(fitted, data, tmp_path):
    for row in fitted.split.test:
        sample = fitted.manifest.samples[row]
        (tmp_path / sample.label).mkdir(exist_ok=True)
        shutil.copy(data / sample.path, tmp_path / sample.label)
    judged = evaluate(fitted.folder, tmp_path)
    for key in ("n", "accuracy", "confusion", "macro_f1"):
        assert judged[key] == fitted.evaluation["test"][key], key


def test_classes_are_matched_by_name(fitted, data, tmp_path):
    """A class that is absent shifts nothing, and one that is unknown is left out and named."""
    shutil.copytree(data / "square", tmp_path / "square")
    draw_folders(tmp_path, n_each=3, shapes=("stripes",))
    judged = evaluate(fitted.folder, tmp_path)
    assert judged["n"] == 30
    assert any("stripes" in note for note in judged["notes"])
    assert any("cross" in note and "disc" in note for note in judged["notes"])
    assert judged["per_class"]["disc"]["recall"] is None


def test_a_second_fit_embeds_nothing_and_gives_the_same(fitted, data, tmp_path):
    again = fit(data, tmp_path / "again", PARTS)
    assert again.evaluation["timing"]["n_embedded"] == 0
    for part in ("valid", "test"):
        assert again.evaluation[part] == fitted.evaluation[part]
    assert split_record(again.split, again.manifest)["digest"] == split_record(fitted.split, fitted.manifest)["digest"]
    weights = [(f.folder / "model" / "model.safetensors").read_bytes() for f in (again, fitted)]
    assert weights[0] == weights[1]


def test_arrays_that_are_files_and_blocks_of_rows_change_no_figure(fitted, data, tmp_path, monkeypatch):
    """What a million images need, with limits so low that it happens to ninety."""
    for module in (shards, logistic, probe):
        monkeypatch.setattr(module, "IN_MEMORY", 1)
    monkeypatch.setattr(predictions, "_BLOCK_VALUES", 20)
    monkeypatch.setattr(assess, "TRAIN_LOGITS", 60)
    again = fit(data, tmp_path / "again", PARTS)
    for part in ("valid", "test"):
        assert again.evaluation[part]["accuracy"] == fitted.evaluation[part]["accuracy"]
        np.testing.assert_allclose(again.predictions_of(part).logits, fitted.predictions_of(part).logits, atol=1e-3)
    assert len(again.predictions["train"]) == -(-len(fitted.predictions["train"]) // 3)
    stored = load_run(tmp_path / "again")
    np.testing.assert_allclose(stored.predictions["test"].logits, again.predictions["test"].logits, rtol=1e-6)
    assert write_report(tmp_path / "again").is_file()


def test_the_choice_never_sees_valid_or_test(fitted, data, tmp_path):
    """Replacing every valid and test image by noise changes no weight of the head."""
    for path in data.glob("*/*"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    table = tmp_path / "table.csv"
    rng = np.random.default_rng(5)
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for part in ("train", "valid", "test"):
            for row in getattr(fitted.split, part):
                sample = fitted.manifest.samples[row]
                if part != "train":
                    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / sample.path)
                writer.writerow([sample.path, sample.label, part])
    other = fit(table, tmp_path / "run", SETTINGS)
    np.testing.assert_array_equal(other.classifier.head.weight, fitted.classifier.head.weight)
    assert other.classifier.temperature == fitted.classifier.temperature


def test_a_probe_holds_out_only_the_test_part(data, tmp_path):
    fitted = fit(data, tmp_path / "run", SETTINGS)
    assert {name: len(rows) for name, rows in fitted.split.parts().items()} == {"train": 72, "test": 18}
    assert set(fitted.evaluation) & {"valid", "test"} == {"test"}


def test_a_given_valid_part_may_be_trained_on(data, tmp_path):
    for number, path in enumerate(sorted(data.glob("*/*.jpg"))):
        part = ("train", "valid", "test")[number % 3]
        (tmp_path / "d" / part / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "d" / part / path.parent.name)
    fitted = fit(tmp_path / "d", tmp_path / "run", replace(SETTINGS, final_fit="train+valid"))
    assert {name: len(rows) for name, rows in fitted.split.parts().items()} == {"train": 60, "test": 30}
    assert fitted.evaluation["test"]["per_class"]["disc"]["n_train"] == 20
    with pytest.raises(UsageError, match="--final-fit train\\+valid has no effect without --mode probe"):
        fit(tmp_path / "d", tmp_path / "tuned", FitSettings(final_fit="train+valid", mode="tune"))


def test_train_and_valid_alone_give_no_test_part(data, tmp_path):
    for number, path in enumerate(sorted(data.glob("*/*.jpg"))):
        part = "Train" if number % 3 else "VAL"
        (tmp_path / "d" / part / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "d" / part / path.parent.name)
    fitted = fit(tmp_path / "d", tmp_path / "run", SETTINGS)
    assert "test" not in fitted.evaluation
    assert fitted.evaluation["valid"]["n"] == 30
    assert "evaluation only" in fitted.recipe["valid_used_for"]


# ---- the command


def test_fit_as_a_command_prints_one_json_object(data, tmp_path):
    done = topwork("fit", data, "--out", tmp_path / "run", "--backbone", BACKBONE, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert Path(answer["run"]) == tmp_path / "run"
    assert answer["test"]["n"] > 0
    assert "images_per_second" in answer["timing"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_predict_as_a_command_writes_a_row_for_each_input(fitted, data, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    names = [str(data / "disc" / "disc_3.jpg"), str(tmp_path / "broken.jpg"), str(tmp_path / "missing.png")]
    for ending in ("csv", "jsonl", "parquet"):
        done = topwork(
            "predict", fitted.folder, "-", "--out", tmp_path / f"rows.{ending}", "--max-reject-fraction", "0.7",
            input="\n".join(names),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "3 rows" in done.stdout
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == names
    assert [row["outcome"] == "error" for row in rows] == [False, True, True]
    assert rows[0]["label"] in fitted.manifest.classes
    assert "no such file" in rows[2]["error"]
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] or None for row in rows]
    assert [row["path"] for row in pq.read_table(tmp_path / "rows.parquet").to_pylist()] == names
    again = topwork("predict", fitted.folder, names[0], "--out", tmp_path / "rows.csv", "--max-reject-fraction", "0.7")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_list_on_stdin_a_folder_and_a_pattern_name_the_same_images(fitted, data):
    from topwork.export.inputs import list_inputs

    folder = list_inputs([str(data / "cross")])
    assert folder == list_inputs([str(data / "cross" / "*.jpg")])
    assert folder[:3] == [str(data / "cross" / f"cross_{n}.jpg") for n in range(3)], "natural order"
    done = topwork("predict", fitted.folder, "-", "--json", input="\n".join(folder[:2]))
    assert [row["path"] for row in json.loads(done.stdout)["predictions"]] == folder[:2]


def test_a_killed_predict_goes_on_without_doubles_or_gaps(fitted, data, tmp_path):
    names = sorted(str(p) for p in data.glob("*/*.jpg"))
    (tmp_path / "names").write_text("\n".join(names))
    program = (
        "import sys, time\nfrom topwork.export import predictor as p\n"
        "answer = p.Predictor.answer\np.Predictor.answer = lambda s, *x: (time.sleep(0.2), answer(s, *x))[1]\n"
        "from topwork.cli import main\nmain(sys.argv[1:])"
    )
    arguments = ["predict", str(fitted.folder), "-", "--out", str(tmp_path / "rows.jsonl")]
    with open(tmp_path / "names") as names_file:
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdin=names_file)
    journal = tmp_path / ".rows.jsonl.journal"
    deadline = time.monotonic() + 120
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 30) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "rows.jsonl").exists()
    done = topwork(*arguments, "--json", input="\n".join(names))
    assert json.loads(done.stdout)["n_resumed"] >= 30
    whole = topwork("predict", fitted.folder, "-", "--out", tmp_path / "whole.jsonl", input="\n".join(names))
    assert whole.returncode == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_starting_up_is_light():
    """What --help and a prediction import decides how long they take; seconds are in benchmarks/."""
    heavy = ("torch", "timm", "sklearn", "scipy", "matplotlib", "pyarrow", "openvino", "numpy")
    checks = f"import sys; loaded = [m for m in {heavy!r} if m in sys.modules]; assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", f"import topwork; {checks}"], check=True)
    program = f"from topwork.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n{checks}"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


HEAVY = {
    "PIL", "datasets", "faiss", "filelock", "fsspec", "huggingface_hub", "nncf", "numpy", "onnx", "onnxruntime",
    "openvino", "peft", "pillow_heif", "pyarrow", "pydicom", "ray", "resource", "rich", "safetensors", "scipy", "sklearn",
    "threadpoolctl", "tifffile", "timm", "torch", "torchvision", "transformers", "webbrowser",
}  # fmt: skip


def test_only_what_is_heavy_optional_or_ours_is_imported_inside_a_function():
    for path in (Path(__file__).parents[1] / "src/topwork").rglob("*.py"):
        tree = ast.parse(path.read_text())
        places = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        functions = [node for place in places for node in place.body if isinstance(node, ast.FunctionDef)]
        for node in (node for function in functions for node in ast.walk(function)):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= HEAVY | {"topwork"}, (path, node.lineno)


def test_a_prediction_imports_neither_torch_nor_timm(fitted, data):
    program = (
        "import sys\nfrom topwork.cli import app\n"
        f"app(['predict', {str(fitted.folder)!r}, {str(data / 'disc' / 'disc_0.jpg')!r}])\n"
        "assert not {'torch', 'timm', 'sklearn', 'scipy'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("command", ["scan", "fit", "evaluate", "predict", "report", "models", "demo", "runs", "cache"])
def test_every_command_explains_itself(command):
    done = topwork(command, "--help-all")
    assert done.returncode == 0
    assert "--json" in done.stdout
    # An option without effect is an error, so only what draws at random takes a seed.
    assert ("--seed" in done.stdout) == (command in ("scan", "fit", "evaluate", "demo"))


def test_the_help_of_fit_fits_one_screen_and_help_all_has_every_option():
    short, long = topwork("fit", "--help").stdout, topwork("fit", "--help-all").stdout
    assert len(short.splitlines()) <= 60
    assert "--help-all" in short
    for item in fields(FitSettings):
        assert "--" + item.name.replace("_", "-") in long.replace("--no-", "--")


# ---- wrong use and trouble


def images_in(root: Path, **classes: int) -> Path:
    for name, n in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(n):
            draw("disc", number + 100 * len(name)).save(root / name / f"{number}.jpg")
    return root


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda p: p, [], "no images in class folders"),
        (lambda p: images_in(p, only=5), [], "only one class"),
        (lambda p: p / "nowhere", [], "no such file"),
        (lambda p: images_in(p, a=5, b=5), ["--backbone", "resnet81"], "Did you mean"),
        (lambda p: images_in(p, a=5, b=5), ["--backbone", "resnet18.tv_in1k"], "cannot be downloaded"),
        (lambda p: images_in(p, a=5, b=5), ["--valid-fraction", "0.9", "--test-fraction", "0.3"], "--valid-fraction"),
        (lambda p: images_in(p, a=5, b=5), ["--mode", "perhaps"], "--mode"),
    ],
    ids=["empty folder", "one class", "no folder", "unknown backbone", "no network", "fractions", "choice"],
)
def test_wrong_use_is_one_clear_line(tmp_path, make, options, words):
    (tmp_path / "data").mkdir()
    options = options if "--backbone" in options else [*options, "--backbone", BACKBONE]
    done = topwork("fit", make(tmp_path / "data"), "--out", tmp_path / "run", *options)
    assert done.returncode in (1, 2), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_missing_columns_are_named(tmp_path):
    (tmp_path / "table.csv").write_text("picture,kind\na.jpg,b\n")
    done = topwork("fit", tmp_path / "table.csv", "--out", tmp_path / "run", "--json")
    assert done.returncode == 2
    assert "no column label; found: picture, kind" in json.loads(done.stdout)["error"]
    assert "picture, kind" in done.stderr


def test_a_class_with_one_image_is_named_and_no_obstacle(tmp_path):
    data = images_in(tmp_path / "data", aa=6, b=6, single=1)
    done = topwork("fit", data, "--out", tmp_path / "run", "--backbone", BACKBONE, "--json")
    assert done.returncode == 0, done.stderr
    assert any("single (1)" in note for note in json.loads(done.stdout)["notes"])


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("chattr"), reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    done = topwork("fit", data, "--out", tmp_path / "file" / "run")
    assert done.returncode == 1
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(other, marks=pytest.mark.slow) for other in ("zsh", "fish"))])
def test_completion_knows_commands_values_and_file_names(shell, tmp_path):
    script = tmp_path / "completion"
    done = topwork("--install-completion", "--shell", shell, "--output", script)
    assert done.returncode == 0, done.stderr
    text = script.read_text()
    assert {"compare-domains", "squash"} <= set(re.findall(r"[\w-]+", text))
    if shell != "fish":  # which completes file names where nothing else is known
        assert text.count({"bash": "compgen -f", "zsh": "_files"}[shell]) > 20


def test_a_finished_run_is_not_overwritten_unasked(fitted, data):
    before = (fitted.folder / "evaluation.json").read_bytes()
    with pytest.raises(UsageError, match="finished run"):
        fit(data, fitted.folder)
    assert (fitted.folder / "evaluation.json").read_bytes() == before


def test_a_folder_of_other_files_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="contains other files"):
        fit(data, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_killed_run_left_of_its_first_file_blocks_nothing(tmp_path):
    folder = tmp_path / "run"
    if (child := os.fork()) == 0:
        with run_folder(folder, overwrite=False) as work, atomic_file(work / "settings.json") as partial:
            partial.write_text("{")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(folder.iterdir())) == 1
    with run_folder(folder, overwrite=False) as work:
        assert not list(work.iterdir())
        (work / ".notes.partial").write_text("mine")
    with pytest.raises(UsageError, match="contains other files"), run_folder(folder, overwrite=False):
        pass
    assert (folder / ".notes.partial").exists()


def test_a_default_output_that_holds_a_run_gets_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("pets", "pets-2", "pets-3"):
        assert free_run_folder("photos/pets") == Path("runs") / expected
        (tmp_path / "runs" / expected).mkdir(parents=True)
        assert free_run_folder("photos/pets.zip") == Path("runs") / expected, "an interrupted run is continued"
        (tmp_path / "runs" / expected / "evaluation.json").write_text("{}")


def test_two_runs_into_one_folder(data, tmp_path):
    folder = tmp_path / "runs" / "run"
    with locked(folder):
        done = topwork("fit", data, "--out", folder)
        assert done.returncode == 2
        assert "another process is writing here" in done.stderr
        assert list(folder.parent.glob(".run.lock")), "the one that was refused leaves the lock of the other alone"
    (folder.parent / ".run.lock").touch()
    assert fit(data, folder, SETTINGS).folder == folder, "a lock file left behind blocks nobody"


def test_a_refused_run_does_not_clean_up_after_the_one_that_writes(tmp_path):
    folder = tmp_path / "run"
    with run_folder(folder, overwrite=False) as work:
        with pytest.raises(UsageError, match="another process"), run_folder(folder, overwrite=False):
            pass
        assert work == folder
        assert folder.is_dir()
    assert not folder.exists(), "nothing was written, so nothing is left"


def test_the_old_run_stays_whole_until_the_new_one_is_complete(fitted, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fitted.folder, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = topwork("fit", tmp_path / "nonexistent", "--out", run, "--overwrite")
    assert done.returncode == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    again = fit(data, run, replace(SETTINGS, seed=1), overwrite=True)
    assert json.loads((run / "settings.json").read_text())["settings"]["seed"] == 1
    assert again.folder == run
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_run_is_not_mixed_with_other_settings(data, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps(asked(data, FitSettings(mode="tune", epochs=3))))
    with pytest.raises(UsageError, match="or start over with --overwrite"):
        fit(data, run, FitSettings(mode="tune", epochs=4))
    assert (run / "checkpoint").is_dir()
    with run_folder(run, overwrite=False, asked=asked(data, FitSettings(mode="tune", epochs=3))):
        assert (run / "checkpoint").is_dir(), "the same run goes on"
    with run_folder(run, overwrite=True, asked=asked(data, FitSettings(mode="tune", epochs=4))):
        assert not (run / "checkpoint").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_it_soon_and_the_run_resumes(data, tmp_path, own_cache, signum):
    program = (
        "import os, sys, time\nfrom topwork.features import embed as e\n"
        "run = e.Embedder._run\n"
        "e.Embedder._run = lambda s: (time.sleep(0.3), run(s), os.mkdir(f'{os.environ[\"RAN\"]}{time.time()}'))\n"
        "from topwork.cli import main\nmain(sys.argv[1:])"
    )
    environment = os.environ | {"RAN": str(tmp_path / "ran-")}
    arguments = ["fit", str(data), "--out", str(tmp_path / "run"), "--backbone", BACKBONE]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("ran-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signum)
    started = time.monotonic()
    _, text = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert time.monotonic() - started < 10
    assert b"Traceback" not in text
    done = topwork("fit", "--resume", tmp_path / "run", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["timing"]["n_embedded"] < 90, "what was embedded before the signal is kept"
    assert topwork("fit", "--resume", tmp_path / "run", env=environment).returncode == 2


def test_more_rejects_than_allowed_end_with_status_3(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for number in range(20):
        (tmp_path / "data" / "disc" / f"bad{number}.jpg").write_text("no image")
    done = topwork("fit", tmp_path / "data", "--out", tmp_path / "run", "--backbone", BACKBONE, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["n_rejected"] == 20
    relaxed = topwork("scan", tmp_path / "data", "--max-reject-fraction", "0.5", "--quick", "--json")
    assert relaxed.returncode == 0


def test_the_users_folder_is_never_written(data):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in data.rglob("*")}
    topwork("scan", data)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in data.rglob("*")} == before


def test_wrong_arguments_get_one_line_that_names_the_help() -> None:
    done = topwork("predict", "somewhere", "--json")
    assert (done.returncode, done.stderr) == (2, "topwork: IMAGES is missing (topwork predict --help).\n")
    assert json.loads(done.stdout) == {"error": "IMAGES is missing (topwork predict --help)."}
    assert "Did you mean --epochs?" in topwork("fit", "photos", "--epoch", "3").stderr
    help_text = subprocess.run(
        [sys.executable, "-m", "topwork", "help", "fit"], check=True, capture_output=True, text=True
    )
    assert "--mode" in help_text.stdout
