"""Predictor and predict: f32 answers, flips, heatmaps, archives, bounded and repeatable."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawing import draw_folders
from terminal import topwork
from topwork.commands.evaluate import evaluate
from topwork.commands.fit import fit
from topwork.errors import UsageError
from topwork.evaluation.predictions import softmax
from topwork.export.inputs import list_inputs, read_image
from topwork.export.predictor import Predictor
from topwork.features.engine import OpenVINOEngine, TorchEngine
from topwork.models.classifier import load_classifier
from topwork.settings import FitSettings

# ---- f32


@pytest.mark.parametrize("head", ["plain", "extended"])
def test_answers_are_those_of_f32_on_pillows_pixels(runs, images, head):
    """Against torch, on pixels that Pillow resized: what any other program would do."""
    predictor = Predictor(runs[head], n_top=3)
    classifier, spec = predictor.classifier, predictor.spec
    assert (predictor.engine.precision, spec.resizer) == ("f32", "pillow")
    size = spec.width, spec.height
    pixels = [Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR) for path in images]
    blocks = TorchEngine(classifier.backbone, "f32").run_unrounded(np.stack([np.asarray(p) for p in pixels]))
    expected = softmax(classifier.head.logits(dict(blocks)))
    found = np.array([[dict(p.top)[name] for name in classifier.classes] for p in predictor.predict(images)])
    np.testing.assert_allclose(found, expected, atol=5e-4)  # float16 features
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_an_answer_does_not_depend_on_the_batch(runs, images):
    predictor = Predictor(runs["extended"])
    pixels = np.stack([predictor.load(path, path).pixels for path in images[:22]])
    together = predictor.engine.run_unrounded(pixels)
    for name, values in together.items():
        alone = np.concatenate([predictor.engine.run_unrounded(p[None])[name] for p in pixels])
        np.testing.assert_array_equal(values, alone)


class Bf16Engine(OpenVINOEngine):
    """An engine in f32 that drops the last 16 bits of every feature and says so: bf16 for processors without."""

    def run(self, images):
        """Features as a network in bf16 gives them, roughly."""
        blocks = self.run_unrounded(images)
        return {
            name: (values.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float16)
            for name, values in blocks.items()
        }


def test_figures_are_about_f32_answers_also_after_training_in_bf16(drawn, images, tmp_path, monkeypatch):
    from topwork.features import engine

    load = engine.load_engine

    def load_engine(backbone, kind="auto", precision="auto", device="auto"):
        found = load(backbone, kind, "f32")
        return found if precision == "f32" else Bf16Engine(engine.compiled_path(backbone), "bf16")

    for module in ("topwork.features.embed", "topwork.features.cluster"):
        monkeypatch.setattr(f"{module}.load_engine", load_engine)
    fitted = fit(drawn, tmp_path / "run", FitSettings(backbone="random:test_efficientnet", seed=3))
    assert fitted.recipe["precision"] == fitted.classifier.precision == "bf16"
    part = fitted.predictions["test"]
    paths = [str(drawn / fitted.manifest.samples[row].path) for row in part.sample_indices]
    answers = Predictor(tmp_path / "run", n_top=3).predict(paths)
    stated = np.array([[dict(p.top)[name] for name in fitted.classifier.classes] for p in answers])
    np.testing.assert_allclose(part.probabilities, stated, atol=1e-6)  # digits that a prediction has


def test_evaluate_reports_what_predict_answers(runs, drawn, images):
    judged = evaluate(runs["plain"], drawn)
    answers = Predictor(runs["plain"]).predict(images)
    right = np.mean([answer.label == Path(answer.path).parent.name for answer in answers])
    assert judged["accuracy"]["value"] == right


def test_an_image_that_vanished_in_between_keeps_its_pixels(runs, images, tmp_path):
    predictor = Predictor(runs["plain"])
    path = tmp_path / "image.jpg"
    path.write_bytes(Path(images[0]).read_bytes())
    loaded = predictor.load(path, "image")
    path.unlink()
    assert predictor.answer_loaded([loaded])[0].outcome != "error"


# ---- runtimes


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_every_runtime_answers_alike(runs, images, monkeypatch):
    answers = {
        name: Predictor(runs["plain"], runtime=name).predict(images[:20]) for name in ("auto", "onnxruntime", "torch")
    }
    reference = answers.pop("auto")
    for found in answers.values():
        assert [p.label for p in found] == [p.label for p in reference]
        np.testing.assert_allclose([p.probability for p in found], [p.probability for p in reference], atol=1e-3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Predictor(runs["plain"]).engine.kind == "torch"
    with pytest.raises(UsageError, match="--runtime onnxruntime"):
        Predictor(runs["plain"], runtime="onnxruntime")


def test_a_precision_that_is_not_available_is_refused(runs):
    with pytest.raises(UsageError, match="--precision bf16: not available"):
        Predictor(runs["plain"], runtime="onnxruntime", precision="bf16")


# ---- asking


def test_many_threads_get_the_answers_of_one(runs, images):
    predictor = Predictor(runs["plain"])
    expected = predictor.predict(images)
    found: dict[int, object] = {}

    def ask(number):
        found[number] = predictor.predict(images[number::6])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(6)] == [expected[n::6] for n in range(6)]


def test_bytes_and_files_are_answered_alike(runs, images):
    predictor = Predictor(runs["plain"])
    by_path = predictor.predict(images[:5])
    by_bytes = predictor.predict([Path(path).read_bytes() for path in images[:5]])
    assert [(p.outcome, p.top) for p in by_path] == [(p.outcome, p.top) for p in by_bytes]
    assert [p.path for p in by_bytes] == ["#0", "#1", "#2", "#3", "#4"]


def test_mirrored_views_make_an_image_and_its_mirror_equal(runs, images, tmp_path):
    predictor = Predictor(runs["plain"], n_top=3, tta=True)
    image = Image.open(images[3])
    image.resize((160, 160)).save(tmp_path / "image.png")
    Image.open(tmp_path / "image.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirror.png")
    a, b = predictor.predict([tmp_path / "image.png", tmp_path / "mirror.png"])
    assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-6)
    plain = Predictor(runs["plain"], n_top=3).predict([tmp_path / "image.png"])[0]
    assert dict(plain.top) != pytest.approx(dict(a.top), abs=1e-6)


# ---- archives


def archive_of(images, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for image in images[:3]:
                file.write(image, f"nested/{Path(image).name}")
            file.writestr("notes.jpg", "no image")
            file.write(images[0], "../outside.jpg")
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
            for image in images[:3]:
                file.add(image, f"nested/{Path(image).name}")
            file.add(__file__, "notes.jpg")
            file.add(images[0], "../outside.jpg")
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_has_a_row_for_each_member(runs, images, tmp_path, name):
    archive = archive_of(images, tmp_path / name)
    inputs = list_inputs([str(archive), images[4]])
    assert [Path(i).name for i in inputs[:3]] == [Path(image).name for image in images[:3]]
    answers = Predictor(runs["plain"]).predict(inputs)
    expected = Predictor(runs["plain"]).predict(images[:3])
    assert [a.top for a in answers[:3]] == [e.top for e in expected]
    assert "not an image" in answers[3].error
    assert "outside" in answers[4].error
    assert answers[5].error is None


def test_a_file_that_only_begins_like_an_archive_is_one_row(runs, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"PK\3\4 and so on")
    assert list_inputs([str(tmp_path / "a.jpg")]) == [str(tmp_path / "a.jpg")]
    assert Predictor(runs["plain"]).predict([tmp_path / "a.jpg"])[0].outcome == "error"


def test_a_member_by_its_name(images, tmp_path):
    archive = archive_of(images, tmp_path / "a.zip")
    assert read_image(f"{archive}/nested/{Path(images[1]).name}") == Path(images[1]).read_bytes()


# ---- the command


def test_pictures_of_where_the_model_looked(runs, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    done = topwork(
        "predict",
        runs["plain"],
        images[0],
        tmp_path / "broken.jpg",
        images[1],
        "--explain",
        tmp_path / "maps",
        "--json",
    )
    assert done.returncode == 3, "one of three inputs failed, more than the tenth that is allowed"
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == [f"000001-{Path(images[0]).stem}.jpg", f"000003-{Path(images[1]).stem}.jpg"]
    picture = np.asarray(Image.open(tmp_path / "maps" / names[0]))
    assert picture.shape == np.asarray(Image.open(images[0])).shape


def test_options_of_the_command_change_the_journal(runs, images, tmp_path):
    """Rows of another way of asking are never taken over."""
    from topwork.export.batch import _digest

    digests = {_digest(Predictor(runs["plain"], n, tta=tta), images) for n in (2, 3) for tta in (False, True)}
    assert len(digests) == 4


def test_a_list_with_names_of_all_kinds(runs, images, tmp_path):
    strange = tmp_path / "with space, 'quote' and ünïcode.jpg"
    strange.write_bytes(Path(images[0]).read_bytes())
    done = topwork("predict", runs["plain"], strange, "--out", tmp_path / "rows.jsonl", "--tta")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "rows.jsonl").read_text())["path"] == str(strange)


def test_a_folder_stands_for_its_images(runs, tmp_path):
    folder = draw_folders(tmp_path / "new", n_each=2)
    (folder / "README.md").write_text("x")
    with zipfile.ZipFile(tmp_path / "new.zip", "w") as file:
        for path in sorted(folder.rglob("*.jpg")):
            file.write(path, path.relative_to(folder))
    predictor, wanted = Predictor(runs["plain"]), [str(path) for path in sorted(folder.rglob("*.jpg"))]
    expected = [(one.label, one.probability) for one in predictor.predict(wanted)]
    assert len(expected) == 4
    for images in (folder, str(folder), [folder], f"{folder}/*/*.jpg", tmp_path / "new.zip"):
        found = predictor.predict(images)
        assert [(one.label, one.probability) for one in found] == expected
        assert all(one.outcome != "error" for one in found)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="No images"):
        predictor.predict(tmp_path / "empty")
    assert [one.outcome for one in predictor.predict(["", tmp_path / "none.jpg"])] == ["error", "error"]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_pillow_image_without_a_brightness_is_refused_as_its_file_is(runs, tmp_path, mode):
    image = Image.new("L", (40, 40), 90).convert(mode)
    image.save(tmp_path / "image.tif")
    answers = Predictor(runs["plain"]).predict([tmp_path / "image.tif", image])
    assert [answer.outcome for answer in answers] == ["error", "error"]
    assert answers[0].error == answers[1].error


# ---- copies


def _predicted(predictor, images):
    return [(answer.label, answer.probability) for answer in predictor.predict(images)]


def _put(queue, predictor, images):
    queue.put(_predicted(predictor, images))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_answer_alike_from_another_working_directory(runs, images, tmp_path, monkeypatch, copied):
    monkeypatch.chdir(runs["plain"].parent)
    predictor = Predictor("plain", 1, tta=True)
    monkeypatch.chdir(tmp_path)
    found = copied(predictor)
    assert _predicted(found, images[:5]) == _predicted(predictor, images[:5])
    assert found.tta
    assert len(found.predict(images[0])[0].top) == 1


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_processes_answer_alike(runs, images, runtime):
    predictor = Predictor(runs["plain"], runtime=runtime)
    expected = _predicted(predictor, images[:20])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_put, args=(queue, predictor, images[:20]), daemon=True)
    process.start()
    try:
        assert [label for label, _ in queue.get(timeout=60)] == [label for label, _ in expected]
    finally:
        process.kill()


@pytest.mark.parametrize("change", [{"mean": (0.1, 0.2, 0.3)}, {"height": 96, "width": 96}, {"mirror": "horizontal"}])
def test_preprocessing_changed_in_memory_is_used(runs, images, change):
    saved = load_classifier(runs["plain"])
    changed = replace(saved, backbone=saved.backbone.with_spec(**change))
    predictor = Predictor(changed)
    assert _predicted(predictor, images[:5]) == _predicted(Predictor(changed, runtime="torch"), images[:5])
    assert _predicted(pickle.loads(pickle.dumps(predictor)), images[:5]) == _predicted(predictor, images[:5])
    assert predictor.engine.kind == "torch"
    assert Predictor(saved).engine.kind == "openvino"
