"""Predictor and predict: the second look, mirrored views, pictures, archives, bounded and repeatable."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from topwork.commands.evaluate import evaluate
from topwork.data.images import decode
from topwork.data.transforms import InputSpec
from topwork.errors import UsageError
from topwork.evaluation.predictions import softmax
from topwork.export.batch import list_inputs
from topwork.export.predictor import Predictor, read_image
from topwork.features import careful
from topwork.features.careful import (
    LOGIT_ERROR,
    SHRUNK_ERROR,
    TOLERANCE,
    CarefulNetwork,
    careful_features,
    careful_pixels,
    is_shrunk,
    needs_second_look,
)
from topwork.features.engine import TorchEngine
from topwork.models.classifier import load_classifier, save_classifier


def topwork(*arguments):
    command = [sys.executable, "-m", "topwork.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def f32_model(run, folder):
    """The model of a run, said to be f32 as it would be on a processor without bf16."""
    classifier = load_classifier(run)
    spec = replace(classifier.backbone.spec, resizer="pillow")
    changed = replace(classifier, precision="f32", backbone=replace(classifier.backbone, spec=spec))
    save_classifier(changed, folder / "model", run / "model" / "openvino.xml", "")
    return folder / "model"


# ---- the second look


@pytest.mark.parametrize(
    ("probabilities", "precision", "shrunk", "expected"),
    [
        ([0.99, 0.01], "bf16", False, False),  # 0.4 * 0.99 * 0.01 = 0.004
        ([0.93, 0.07], "bf16", False, True),  # 0.4 * 0.93 * 0.07 = 0.026: off by more than a hundredth
        ([0.6, 0.4], "f32", False, False),  # a lead of 0.41 in logits, against an error of 0.005
        ([0.501, 0.499], "f32", False, True),  # a lead of 0.004
        ([0.6, 0.4], "f32", True, True),  # 0.155 * 0.24 = 0.037
        ([0.97, 0.03], "f32", True, False),  # 0.155 * 0.029 = 0.0045
        ([0.3, 0.299, 0.401], "f32", False, False),  # the best and the second decide, wherever they stand
        ([0.4, 0.2, 0.4], "f32", False, True),
    ],
)
def test_the_second_look_is_for_close_answers(probabilities, precision, shrunk, expected):
    assert needs_second_look([probabilities], precision, [shrunk]).tolist() == [expected]


@given(
    st.lists(st.floats(-6, 6), min_size=2, max_size=6),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["f32", "bf16"]),
    st.booleans(),
)
def test_what_gets_no_second_look_cannot_be_far_off(logits, seed, precision, shrunk):
    """Against the definition: any change of the logits within the bounds leaves the best class and nearly all else."""
    bound = LOGIT_ERROR[precision] + SHRUNK_ERROR * shrunk
    moved = np.array(logits) + np.random.default_rng(seed).choice([-bound / 2, bound / 2], len(logits))
    before, after = softmax(np.array([logits, moved]))
    if not needs_second_look([before], precision, [shrunk])[0]:
        assert before.argmax() == after.argmax()
        assert np.abs(before - after).max() < 1.4 * TOLERANCE  # the bound is of first order


@pytest.mark.parametrize("head", ["plain", "extended"])
def test_f32_answers_are_those_of_pillows_pixels(runs, images, head, tmp_path):
    """Against torch, on pixels that Pillow resized: what any other program would do."""
    predictor = Predictor(f32_model(runs[head], tmp_path), n_top=3)
    classifier, spec = predictor.classifier, predictor.classifier.backbone.spec
    assert (classifier.precision, spec.resizer) == ("f32", "pillow")
    size = spec.width, spec.height
    pixels = [Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR) for path in images]
    blocks = TorchEngine(classifier.backbone, "f32").run_unrounded(np.stack([np.asarray(p) for p in pixels]))
    expected = softmax(classifier.head.logits(dict(blocks)))
    found = np.array([[dict(p.top)[name] for name in classifier.classes] for p in predictor.predict(images)])
    np.testing.assert_allclose(found, expected, atol=5e-4)  # float16 features
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("head", ["plain", "extended"])
def test_the_second_look_is_that_of_f32_on_pillows_pixels(runs, images, head, monkeypatch):
    """Every answer looked at again is exact, whatever the first look saw."""
    predictor = Predictor(runs[head], n_top=3)
    classifier = predictor.classifier
    careful = CarefulNetwork(classifier.backbone).run(
        np.stack([careful_pixels(Path(path).read_bytes(), classifier.backbone.spec) for path in images])
    )
    expected = softmax(classifier.head.logits(dict(careful)))
    monkeypatch.setattr("topwork.export.predictor.unsure_rows", lambda _, p, *__: np.arange(len(p)) % 2 == 1)
    monkeypatch.setattr(predictor, "_quick", lambda pixels: {k: v * 0 for k, v in predictor.engine.run(pixels).items()})
    found = np.array([[dict(p.top)[name] for name in classifier.classes] for p in predictor.predict(images)])
    np.testing.assert_allclose(found[1::2], expected[1::2], atol=1e-6)
    assert np.abs(found[0::2] - expected[0::2]).max() > 0.01


def test_the_second_look_does_not_depend_on_the_batch(runs, images):
    network = CarefulNetwork(load_classifier(runs["extended"]).backbone)
    pixels = np.stack([careful_pixels(Path(path).read_bytes(), network.backbone.spec) for path in images[:22]])
    together = network.run(pixels)
    for name, values in together.items():
        np.testing.assert_array_equal(values, np.concatenate([network.run(p[None])[name] for p in pixels]))


def test_only_the_images_that_need_it_are_read_again(runs, images, monkeypatch):
    predictor = Predictor(runs["plain"], n_top=3)
    seen: list[int] = []
    run = CarefulNetwork.run
    monkeypatch.setattr(CarefulNetwork, "run", lambda self, pixels: (seen.append(len(pixels)), run(self, pixels))[1])
    monkeypatch.setattr("topwork.export.predictor.unsure_rows", lambda _, p, *__: np.zeros(len(p), np.bool_))
    quick = predictor.predict(images)
    limit = np.median([p.probability for p in quick])
    monkeypatch.setattr("topwork.export.predictor.unsure_rows", lambda _, p, *__: p.max(1) < limit)
    answers = predictor.predict(images)
    assert 0 < sum(seen) < len(images)
    for a, b in zip(answers, quick, strict=True):
        assert a == b or b.probability <= limit


def test_a_large_photograph_counts_as_shrunk_where_the_decoder_shrinks_it(tmp_path):
    spec = InputSpec(height=32, width=32)
    for side in (100, 127, 128, 129, 300):
        Image.new("RGB", (side, side + 40)).save(tmp_path / "photo.jpg")
        decoded = decode((tmp_path / "photo.jpg").read_bytes(), min_side=spec.min_side)
        assert is_shrunk(side, side + 40, spec) == (decoded.pixels.shape[1] < side), side


def test_evaluate_reports_what_predict_answers(runs, drawn, images):
    judged = evaluate(runs["plain"], drawn)
    answers = Predictor(runs["plain"]).predict(images)
    right = np.mean([answer.label == Path(answer.path).parent.name for answer in answers])
    assert judged["accuracy"]["value"] == right


def test_careful_features_are_kept_and_exact(runs, images, tmp_path):
    network = CarefulNetwork(load_classifier(runs["plain"]).backbone)
    hashes = [f"hash {n}" for n in range(4)]
    read: list[int] = []

    def content(number):
        read.append(number)
        return Path(images[number]).read_bytes()

    first = careful_features(network, tmp_path, hashes, content)
    again = careful_features(network, tmp_path, hashes[::-1], content)
    assert sorted(read) == [0, 1, 2, 3], "each is read once"
    for name in first:
        assert first[name].dtype == np.float32
        np.testing.assert_array_equal(first[name], again[name][::-1])
    alone = network.run(careful_pixels(content(2), network.backbone.spec)[None])
    np.testing.assert_array_equal(alone["last"][0], first["last"][2])


def absent(*_):
    raise ImportError


def test_torch_takes_over_where_there_is_no_compiled_form(runs, images, monkeypatch):
    network = CarefulNetwork(load_classifier(runs["extended"]).backbone)
    pixels = careful_pixels(Path(images[0]).read_bytes(), network.backbone.spec)[None]
    expected = network.run(pixels)
    monkeypatch.setattr(careful, "OpenVINOEngine", absent)
    other = CarefulNetwork(network.backbone).run(pixels)
    for name in expected:
        np.testing.assert_allclose(other[name], expected[name], atol=1e-4)


def test_an_image_that_vanished_in_between_keeps_its_pixels(runs, images, tmp_path):
    predictor = Predictor(runs["plain"])
    path = tmp_path / "image.jpg"
    path.write_bytes(Path(images[0]).read_bytes())
    loaded = predictor.load(path, "image")
    path.unlink()
    assert predictor.answer_loaded([loaded])[0].outcome != "error"


# ---- runtimes


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_every_runtime_answers_alike_and_the_fastest_is_remembered(runs, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))  # what is remembered here is nothing to other tests
    answers = {
        name: Predictor(runs["plain"], runtime=name).predict(images[:20]) for name in ("auto", "onnxruntime", "torch")
    }
    reference = answers.pop("auto")
    for found in answers.values():
        assert [p.label for p in found] == [p.label for p in reference]
        np.testing.assert_allclose([p.probability for p in found], [p.probability for p in reference], atol=TOLERANCE)
    speeds = {"OpenVINOEngine": 3.0, "ONNXRuntimeEngine": 1.0, "TorchEngine": 2.0}
    monkeypatch.setattr("topwork.export.runtime._seconds", lambda engine, _: speeds[type(engine).__name__])
    assert Predictor(runs["plain"], runtime="fastest").engine.kind == "onnxruntime"
    assert Predictor(runs["plain"]).engine.kind == "onnxruntime"
    monkeypatch.setattr("topwork.export.runtime.is_there", lambda _, name: name != "onnxruntime")
    assert Predictor(runs["plain"]).engine.kind == "openvino"
    with pytest.raises(UsageError, match="--runtime onnxruntime"):
        Predictor(runs["plain"], runtime="onnxruntime")


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
            file.writestr("notes.txt", "no image")
            file.write(images[0], "../outside.jpg")
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
            for image in images[:3]:
                file.add(image, f"nested/{Path(image).name}")
            file.add(__file__, "notes.txt")
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
    assert done.returncode == 0, done.stderr
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
