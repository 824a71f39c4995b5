"""``ImageClassifier`` and ``ImageFeatures`` behave as scikit-learn's tools expect.

``check_estimator`` runs what does not depend on the input: parameters, cloning, repr, tags. Its other checks pass tables
of floats (or sparse, object or complex ones) as X, which are no images, so scikit-learn skips them for estimators whose
tags say so (``two_d_array = False``). What they would check is tested here with images: labels as column, of wrong
shape, missing or of one class; empty input; unfitted use; determinism; pipelines, grid search, data frames, ``set_output``.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from drawing import draw, draw_folders
from topwork import ImageClassifier, ImageFeatures
from topwork.errors import UsageError

SMALL = "random:test_efficientnet"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = draw_folders(tmp_path_factory.mktemp("estimator"), n_each=12)
    paths = sorted(str(path) for path in root.glob("*/*.jpg"))
    return paths, [path.split("/")[-2] for path in paths]


def test_fit_predict_and_score(images):
    paths, labels = images
    model = ImageClassifier(SMALL).fit(paths, labels)
    assert model.score(paths, labels) > 0.9
    assert model.classes_.tolist() == ["disc", "square"]
    probabilities = model.predict_proba(paths)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (model.classes_[probabilities.argmax(1)] == model.predict(paths)).all()
    assert model.decision_function(paths).shape == (24,)


def test_it_is_cloned_and_cross_validated(images):
    paths, labels = images
    model = clone(ImageClassifier(SMALL, head="plain", random_state=3))
    assert model.get_params()["random_state"] == 3
    assert cross_val_score(model, paths, labels, cv=3).mean() > 0.8


def test_arrays_and_files_are_treated_alike(tmp_path):
    pictures = [np.asarray(draw(shape, n)) for shape in ("disc", "square") for n in range(8)]
    labels = [0] * 8 + [1] * 8
    model = ImageClassifier(SMALL).fit(np.stack(pictures), labels)
    draw("disc", 40).save(tmp_path / "one.png")
    from_file = model.predict_proba([str(tmp_path / "one.png")])
    np.testing.assert_array_equal(from_file, model.predict_proba(np.asarray(draw("disc", 40))[None]))


def test_gray_arrays_are_taken_and_floats_refused_by_name(images):
    paths, labels = images
    model = ImageClassifier(SMALL).fit(paths, labels)
    assert model.predict(np.zeros((2, 50, 60), np.uint8)).shape == (2,)
    with pytest.raises(UsageError, match="uint8"):
        model.predict(np.zeros((1, 50, 60, 3)))


def test_a_broken_file_is_named(images, tmp_path):
    paths, labels = images
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UsageError, match=r"broken\.jpg"):
        ImageClassifier(SMALL).fit([*paths, str(tmp_path / "broken.jpg")], [*labels, "disc"])


def test_lengths_must_agree(images):
    with pytest.raises(UsageError, match="24 images but 1 label"):
        ImageClassifier().fit(images[0], ["disc"])


# ---- conventions


@pytest.fixture(scope="module")
def fitted(images):
    return ImageClassifier(SMALL, head="plain").fit(*images)


@pytest.mark.parametrize("estimator", [ImageClassifier(), ImageFeatures()])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_checks_of_scikit_learn_that_need_no_table_pass(estimator):
    with pytest.warns(SkipTestWarning, match="requires input"):
        check_estimator(estimator)


@pytest.mark.parametrize("random_state", [None, 7, np.random.RandomState(0)])
def test_random_states_of_every_kind_are_taken(images, random_state):
    model = ImageClassifier(SMALL, head="plain", n_jobs=-1, random_state=random_state).fit(*images)
    assert model.score(*images) > 0.9
    assert model.random_state is random_state  # parameters stay as they were given


def test_a_seed_gives_the_same_model(images):
    one, two = (ImageClassifier(SMALL, head="plain", random_state=5).fit(*images) for _ in range(2))
    np.testing.assert_array_equal(one.head_.weight, two.head_.weight)


def test_a_column_of_labels_is_taken(images, fitted):
    paths, labels = images
    model = ImageClassifier(SMALL, head="plain").fit(np.array(paths)[:, None], np.array(labels)[:, None])
    np.testing.assert_array_equal(model.predict_proba(paths), fitted.predict_proba(paths))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.eye(2)[[0] * 12 + [1] * 12], "one-hot"),
        (["disc"] * 23 + [None], r"y\[23\] has no label"),
        ([0.0] * 23 + [float("nan")], r"y\[23\] has no label"),
        (["disc"] * 24, "at least two classes"),
        (np.linspace(0, 1, 24), "class labels"),
        (["disc"] * 12 + [3] * 12, "class labels|disc"),
    ],
)
def test_labels_that_cannot_be_used_are_named(images, labels, words):
    labels = np.array(labels, dtype=object) if isinstance(labels, list) and 3 in labels else labels
    with pytest.raises(UsageError, match=words) as caught:
        ImageClassifier().fit(images[0], labels)
    assert isinstance(caught.value, ValueError)  # what users of scikit-learn catch


def test_empty_input_and_an_unfitted_model(fitted):
    assert fitted.predict([]).shape == (0,)
    assert fitted.predict_proba([]).shape == (0, 2)
    with pytest.raises(UsageError, match="no images"):
        ImageClassifier().fit([], [])
    with pytest.raises(UsageError, match="single image"):
        fitted.predict("one.jpg")
    with pytest.raises(NotFittedError):
        ImageClassifier().predict(["one.jpg"])
    with pytest.raises(UsageError, match="n_jobs=0"):
        clone(fitted).set_params(n_jobs=0).fit(["a", "b"], [0, 1])


@pytest.mark.parametrize("change", [lambda i: i.quantize(64), lambda i: i.convert("CMYK"), lambda i: i.convert("RGBA")])
def test_pillow_images_of_any_mode_answer_as_their_rgb_arrays(change, fitted):
    pictures = [change(draw("disc", n)) for n in range(3)]
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    np.testing.assert_allclose(fitted.predict_proba(pictures), fitted.predict_proba(arrays), atol=0.02)


def test_pillow_images_are_turned_upright(fitted):
    picture = draw("disc", 3)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    np.testing.assert_allclose(fitted.predict_proba([turned]), fitted.predict_proba([picture]), atol=1e-6)


def test_data_frames_pipelines_and_searches(images):
    pandas = pytest.importorskip("pandas")
    paths, labels = images
    frame = pandas.DataFrame({"id": range(24), "path": paths, "label": labels})
    search = GridSearchCV(ImageClassifier(SMALL), {"head": ["plain", "extended"]}, cv=2).fit(frame, frame["label"])
    assert search.best_score_ > 0.7
    pipeline = make_pipeline(ImageFeatures(SMALL), LogisticRegression()).fit(frame[["path"]], labels)
    assert pipeline.score(paths, labels) > 0.9
    with pytest.raises(UsageError, match="name the one with paths"):
        ImageClassifier().fit(frame[["id", "label"]], labels)
    table = ImageFeatures(SMALL).set_output(transform="pandas").fit(paths).transform(paths)
    assert list(table.columns[:2]) == ["feature0", "feature1"]
    assert table.shape[0] == 24


# ---- weights


def test_a_weight_of_zero_leaves_an_image_out_and_equal_weights_change_nothing(images):
    paths, labels = images
    plain = ImageClassifier(SMALL, head="plain")
    whole = plain.fit(paths, labels).predict_proba(paths)
    np.testing.assert_allclose(plain.fit(paths, labels, np.full(24, 3.0)).predict_proba(paths), whole, atol=1e-6)
    rest = plain.fit(paths[2:], labels[2:]).predict_proba(paths)
    wrong = [labels[-1], labels[-1], *labels[2:]]
    found = plain.fit(paths, wrong, sample_weight=[0, 0, *[1] * 22]).predict_proba(paths)
    np.testing.assert_array_equal(found, rest)


def test_of_two_labels_of_an_image_the_heavier_wins(images):
    paths, labels = [*images[0], images[0][0]], [*images[1], images[1][-1]]
    model = ImageClassifier(SMALL, head="plain")
    found = [model.fit(paths, labels, sample_weight=[1, *[1] * 23, last]).predict(paths[:1])[0] for last in (0.2, 5)]
    assert found == [labels[0], labels[-1]]


@pytest.mark.parametrize("weights", [[1.0], [-1.0] * 24, [np.nan] * 24, [0] * 24, ["a"] * 24, 2])
def test_weights_that_cannot_be_used_are_named(images, weights):
    with pytest.raises(UsageError, match="sample_weight"):
        ImageClassifier(SMALL).fit(*images, sample_weight=weights)


@pytest.mark.parametrize("option", [{"head": "big"}, {"fit_mode": "stretch"}])
def test_options_that_do_not_exist_are_refused(images, option):
    with pytest.raises(UsageError, match="must be one of"):
        ImageClassifier(SMALL, **option).fit(*images)


def test_one_image_instead_of_a_list_is_refused(images, fitted):
    image = Image.open(images[0][0])
    for one in (images[0][0], image, np.asarray(image)):
        with pytest.raises(UsageError, match="pass a list"):
            fitted.predict(one)


def test_several_labels_per_image_are_pointed_to_the_wrapper(images):
    for y in ([["a", "b"], ["a"]] * 12, np.eye(3)[[0, 1] * 12]):
        with pytest.raises(UsageError, match="MultiOutputClassifier"):
            ImageClassifier(SMALL).fit(images[0], y)


def test_log_probabilities(images, fitted):
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(images[0])), fitted.predict_proba(images[0]))
