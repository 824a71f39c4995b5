"""Predictor and predict: the second look, mirrored views, pictures, archives, bounded and repeatable."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from topwork.evaluation.predictions import softmax
from topwork.features import careful
from topwork.features.careful import LEAST_SURE, CarefulNetwork, careful_features, careful_pixels
from topwork.models.classifier import load_classifier
from topwork.shipping.batch import list_inputs
from topwork.shipping.predictor import Predictor, read_image
from topwork.verbs.evaluate import evaluate


def topwork(*arguments):
    command = [sys.executable, "-m", "topwork.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---- the second look


@pytest.mark.parametrize("head", ["plain", "extended"])
def test_answers_that_are_not_sure_are_those_of_f32_on_pillows_pixels(runs, images, head, monkeypatch):
    """Against torch, in f32, on pixels that Pillow resized; only where the quick answer is not sure."""
    from topwork.features.engine import TorchEngine

    quick = Predictor(runs[head]).predict(images)
    limit = float(np.median([p.probability for p in quick]))  # so that half of these images are looked at again
    monkeypatch.setattr("topwork.shipping.predictor.LEAST_SURE", limit)
    predictor = Predictor(runs[head], n_top=3)
    classifier, spec = predictor.classifier, predictor.classifier.backbone.spec
    size = spec.width, spec.height
    pixels = [Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR) for path in images]
    blocks = TorchEngine(classifier.backbone, "f32").run(np.stack([np.asarray(p) for p in pixels]))
    expected = softmax(classifier.head.logits(dict(blocks)))
    found = np.array([[dict(p.top)[name] for name in classifier.classes] for p in predictor.predict(images)])
    unsure = found.max(1) < 0.99 * limit
    assert 5 < unsure.sum() < len(images)
    np.testing.assert_allclose(found[unsure], expected[unsure], atol=1e-3)  # float16 in the expected features
    assert (found[unsure].argmax(1) == expected[unsure].argmax(1)).all()
    assert np.abs(found - expected)[unsure].max() < np.abs(found - expected)[~unsure].max()


def test_the_second_look_is_taken_only_where_it_is_needed(runs, images, monkeypatch):
    predictor = Predictor(runs["plain"], n_top=3)
    seen: list[int] = []
    run = CarefulNetwork.run
    monkeypatch.setattr(CarefulNetwork, "run", lambda self, pixels: (seen.append(len(pixels)), run(self, pixels))[1])
    answers = predictor.predict(images)
    monkeypatch.setattr("topwork.shipping.predictor.LEAST_SURE", 0.0)
    quick = predictor.predict(images)
    assert sum(seen) == sum(p.probability < LEAST_SURE for p in quick)
    for a, b in zip(answers, quick, strict=True):
        assert a == b or b.probability < LEAST_SURE


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


def test_torch_takes_over_where_there_is_no_compiled_form(runs, images, monkeypatch):
    network = CarefulNetwork(load_classifier(runs["extended"]).backbone)
    pixels = careful_pixels(Path(images[0]).read_bytes(), network.backbone.spec)[None]
    expected = network.run(pixels)
    monkeypatch.setattr(careful, "_compiled", lambda backbone: None)
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
    from topwork.shipping.batch import _digest

    digests = {_digest(Predictor(runs["plain"], n, tta=tta), images) for n in (2, 3) for tta in (False, True)}
    assert len(digests) == 4


def test_a_list_with_names_of_all_kinds(runs, images, tmp_path):
    strange = tmp_path / "with space, 'quote' and ünïcode.jpg"
    strange.write_bytes(Path(images[0]).read_bytes())
    done = topwork("predict", runs["plain"], strange, "--out", tmp_path / "rows.jsonl", "--tta")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "rows.jsonl").read_text())["path"] == str(strange)
