"""``ImageClassifier`` behaves as scikit-learn's tools expect."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from drawing import draw, draw_folders
from topwork import ImageClassifier
from topwork.errors import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = draw_folders(tmp_path_factory.mktemp("estimator"), n_each=12)
    paths = sorted(str(path) for path in root.glob("*/*.jpg"))
    return paths, [path.split("/")[-2] for path in paths]


def test_fit_predict_and_score(images):
    paths, labels = images
    model = ImageClassifier().fit(paths, labels)
    assert model.score(paths, labels) > 0.9
    assert model.classes_.tolist() == ["disc", "square"]
    probabilities = model.predict_proba(paths)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (model.classes_[probabilities.argmax(1)] == model.predict(paths)).all()
    assert model.decision_function(paths).shape == (24,)


def test_it_is_cloned_and_cross_validated(images):
    paths, labels = images
    model = clone(ImageClassifier(head="plain", random_state=3))
    assert model.get_params()["random_state"] == 3
    assert cross_val_score(model, paths, labels, cv=3).mean() > 0.8


def test_arrays_and_files_are_treated_alike(tmp_path):
    pictures = [np.asarray(draw(shape, n)) for shape in ("disc", "square") for n in range(8)]
    labels = [0] * 8 + [1] * 8
    model = ImageClassifier().fit(np.stack(pictures), labels)
    draw("disc", 40).save(tmp_path / "one.png")
    from_file = model.predict_proba([str(tmp_path / "one.png")])
    np.testing.assert_array_equal(from_file, model.predict_proba(np.asarray(draw("disc", 40))[None]))


def test_gray_arrays_are_taken_and_floats_refused_by_name(images):
    paths, labels = images
    model = ImageClassifier().fit(paths, labels)
    assert model.predict(np.zeros((2, 50, 60), np.uint8)).shape == (2,)
    with pytest.raises(UsageError, match="uint8"):
        model.predict(np.zeros((1, 50, 60, 3)))


def test_a_broken_file_is_named(images, tmp_path):
    paths, labels = images
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UsageError, match=r"broken\.jpg"):
        ImageClassifier().fit([*paths, str(tmp_path / "broken.jpg")], [*labels, "disc"])


def test_lengths_must_agree(images):
    with pytest.raises(UsageError, match="24 images but 1 labels"):
        ImageClassifier().fit(images[0], ["disc"])
