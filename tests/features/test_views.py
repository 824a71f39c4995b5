"""Augmented views for the probe: made once, grouped with their image, and left out of what is calibrated on."""

from __future__ import annotations

import numpy as np
import pytest

from drawing import draw_folders
from topwork.data.images import decode
from topwork.data.manifest import scan
from topwork.data.transforms import fit_to_input
from topwork.errors import TopworkError
from topwork.features import probe as probe_module
from topwork.features.embed import Embedder, embed
from topwork.features.probe import Probe, fit_probe
from topwork.features.views import BOUGHT, asked_views, buy_views, with_views
from topwork.models.backbone import load_backbone


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    root = draw_folders(tmp_path_factory.mktemp("data"), n_each=10)
    embedder = Embedder(load_backbone("random:test_efficientnet"))
    manifest = scan(root, visitor=embedder)
    embedder.flush()
    return manifest, embed(embedder.backbone, manifest, embedder=embedder), embedder


def test_views_follow_the_images(embedded) -> None:
    manifest, features, embedder = embedded
    rows = np.array([1, 5, 12, 18])
    seen = embedder.n_embedded
    made = with_views(manifest, features, rows, embedder, asked_views("standard", 3))
    assert embedder.n_embedded == seen + 12
    assert len(made) == 32
    block = made.block("last")
    np.testing.assert_array_equal(block[:20], features.block("last"))
    cosine = [float(np.corrcoef(block[20 + n], block[rows[n % 4]])[0, 1]) for n in range(12)]
    assert min(cosine) > 0.3
    assert max(cosine) < 0.9999
    again = with_views(manifest, features, rows, embedder, asked_views("standard", 3), n_threads=3)
    assert embedder.n_embedded == seen + 12  # all from the store
    assert again.hashes == made.hashes
    other = with_views(manifest, features, rows, embedder, asked_views("standard", 3), seed=1)
    assert not set(other.hashes[20:]) & set(made.hashes[20:])


def test_none_adds_nothing(embedded) -> None:
    manifest, features, embedder = embedded
    assert with_views(manifest, features, np.arange(20), embedder, asked_views("none", 3)).hashes == features.hashes


def test_what_is_calibrated_on_are_images(embedded) -> None:
    manifest, features, embedder = embedded
    made = with_views(manifest, features, np.arange(20), embedder, asked_views("light", 2))
    probe = fit_probe(made, np.array(manifest.labels), 2)
    assert sorted(probe.rows.tolist()) == list(range(20))
    assert len(probe.out_of_fold_logits) == 20
    assert {trial.n_images for trial in probe.trials} == {20}


def test_a_view_is_in_the_fold_of_its_image(embedded, monkeypatch) -> None:
    """And it has the label of its image."""
    manifest, features, embedder = embedded
    labels, rows, searches = np.array(manifest.labels), np.array([1, 5, 7, 12, 15, 18]), []
    made = with_views(manifest, features, rows, embedder, asked_views("light", 2))
    search = probe_module._Search

    def spy(*values):
        searches.append(search(*values))
        return searches[0]

    monkeypatch.setattr(probe_module, "_Search", spy)
    fit_probe(made, labels, 2, rows=rows)
    assert searches[0].y.tolist() == labels[rows][searches[0].rows % 6].tolist()
    assert searches[0].folds.tolist() == searches[0].folds[:6].tolist() * 3
    assert searches[0].data["last"].tolist() == made.block("last", [*rows, *range(20, 32)]).tolist()


def test_views_do_not_make_cross_validation_leave_images_out(embedded, monkeypatch) -> None:
    """With a budget that holds some of the images, heads with and without views see and are scored on the same ones."""
    manifest, features, embedder = embedded
    monkeypatch.setattr("topwork.features.probe.STEP_BUDGET", 12 * 20 * 2 * 3)
    labels = np.array(manifest.labels)
    plain = fit_probe(features, labels, 2)
    probe = fit_probe(with_views(manifest, features, np.arange(20), embedder, asked_views("light", 2)), labels, 2)
    assert 4 <= len(plain.rows) < 20
    assert probe.rows.tolist() == plain.rows.tolist()


def test_an_image_that_changed_is_named(embedded, tmp_path) -> None:
    _, _, embedder = embedded
    root = draw_folders(tmp_path, n_each=3, seed=7)
    manifest = scan(root, visitor=embedder)
    embedder.flush()
    features = embed(embedder.backbone, manifest, embedder=embedder)
    (root / "disc" / "disc_1.jpg").write_bytes((root / "square" / "square_1.jpg").read_bytes())
    with pytest.raises(TopworkError, match=r"disc_1.jpg: changed since the scan"):
        with_views(manifest, features, np.arange(6), embedder, asked_views("flip", 1))


def probe_with_confidence(confidence):
    """A probe that gives the right one of two classes this logit on the four training images."""
    logits = np.zeros((4, 2))
    logits[np.arange(4), [0, 0, 1, 1]] = confidence
    return Probe(head=None, trials=(), rows=np.arange(4), out_of_fold_logits=logits, class_weights=None, reason="")


def bought(confidence_by_n_views, rate, seconds):
    labels = np.array([0, 0, 1, 1])
    return buy_views(lambda views: probe_with_confidence(confidence_by_n_views[len(views)]), labels, rate, seconds)


def test_time_buys_the_mirror_first_and_keeps_what_cross_validation_likes() -> None:
    found = bought({0: 1.0, 1: 2.0, 3: 3.0}, rate=100.0, seconds=60)
    assert [view.name for view in found.views] == ["mirror 0", "light 0", "light 1"]
    assert found.probe.out_of_fold_logits.max() == 3
    found = bought({0: 1.0, 1: 2.0, 3: 0.5}, rate=100.0, seconds=60)
    assert [view.name for view in found.views] == ["mirror 0"]
    found = bought({0: 1.0, 1: 0.5, 3: 0.9}, rate=100.0, seconds=60)
    assert found.views == ()
    assert len(found.tried) == 2


def test_views_that_the_time_does_not_allow_are_not_tried() -> None:
    found = bought({0: 1.0, 1: 2.0}, rate=0.5, seconds=20)  # the mirror needs 8 s, two more views 16 s
    assert [view.name for view in found.views] == ["mirror 0"]
    assert found.tried[-1].startswith("light: not tried, because it would take 16 s")
    assert bought({0: 1.0}, rate=0.1, seconds=20).views == ()


def test_a_mirror_view_is_the_mirror_image(embedded) -> None:
    manifest, _, embedder = embedded
    row, mirror = 3, BOUGHT[0][0]
    pixels = decode(manifest.read(row), min_side=embedder.spec.min_side).pixels
    seen = mirror.pipeline.view(pixels, embedder.spec, np.random.default_rng(0))
    np.testing.assert_array_equal(seen[:, ::-1], fit_to_input(pixels, embedder.spec))
