import numpy as np
import pytest

from topwork.data.images import decode
from topwork.data.transforms import InputSpec, fit_to_input
from topwork.evaluation.perturb import (
    HALF,
    IMAGENET,
    PERTURBATIONS,
    alternatives,
    compress,
    gray,
    hide_center,
    hide_surround,
    high_pass,
    misfit_sentence,
    quarter_turn,
    renormalized,
    shrink,
    shuffle_patches,
    silhouettes,
    statistics_fit,
    swap_channels,
    tilt,
)
from topwork.models.backbone import load_backbone


def photos(n=3, height=64, width=64):
    """Smooth colors with a disc, different in each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    images = []
    for _ in range(n):
        ground = rng.uniform(60, 200, 3) + 0.3 * x[..., None] + rng.normal(0, 2, (height, width, 3))
        disc = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 5) ** 2)[..., None]
        images.append(np.clip(np.where(disc, rng.uniform(0, 255, 3), ground), 0, 255).astype(np.uint8))
    return np.stack(images)


@pytest.mark.parametrize("some", PERTURBATIONS, ids=lambda some: some.name)
@pytest.mark.parametrize("shape", [(64, 64), (60, 96)])
def test_every_one_keeps_shape_and_changes_every_image_the_same_way_each_time(some, shape):
    images = photos(2, *shape)
    before = images.copy()
    changed = some.make(images)
    assert (changed.shape, changed.dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(changed, some.make(images))
    assert all((a != b).any() for a, b in zip(changed, images, strict=True))


def test_an_image_is_changed_alone():
    """A batch is not mixed up: nothing about one image shows in another."""
    images = photos(3)
    for some in PERTURBATIONS:
        np.testing.assert_array_equal(some.make(images)[1], some.make(images[:2])[1], err_msg=some.name)


def test_gray_and_swapped_channels():
    images = photos()
    assert (gray(images).std(axis=3) == 0).all()
    np.testing.assert_array_equal(swap_channels(swap_channels(images)), images)


def test_shuffled_patches_are_the_same_patches_elsewhere():
    images = photos(1)
    changed = shuffle_patches(images, 4)
    patches = {tuple(p.ravel()) for row in np.split(images[0], 4) for p in np.split(row, 4, axis=1)}
    moved = [p for row in np.split(changed[0], 4) for p in np.split(row, 4, axis=1)]
    assert {tuple(p.ravel()) for p in moved} == patches
    still = [p for row in np.split(images[0], 4) for p in np.split(row, 4, axis=1)]
    assert not any((a == b).all() for a, b in zip(moved, still, strict=True))


def test_middle_and_surround_hide_half_of_the_area_each_and_all_of_it_together():
    images = photos(1, 100, 100)
    no_center, no_surround = hide_center(images), hide_surround(images)
    kept_outside = (no_center == images).all(axis=3)
    assert 0.48 < kept_outside.mean() < 0.52
    color = images[0].mean((0, 1)).round()
    assert (no_center[0, 50, 50] == color).all()
    assert (no_surround[0, 2, 2] == color).all()
    both = np.where((no_surround == images).all(axis=3)[..., None], no_surround, no_center)
    np.testing.assert_array_equal(both, images)


def test_four_quarter_turns_are_none_and_a_small_tilt_keeps_the_middle():
    images = photos()
    np.testing.assert_array_equal(quarter_turn(quarter_turn(images, 3)), images)
    np.testing.assert_array_equal(tilt(images, 0), images)
    middle = np.abs(tilt(images, 15)[:, 31:33, 31:33].astype(int) - images[:, 31:33, 31:33])
    assert middle.max() < 12


def test_high_pass_drops_what_a_blur_keeps():
    flat = np.full((1, 64, 64, 3), 200, np.uint8)
    assert np.abs(high_pass(flat).astype(int) - 127).max() <= 1


def test_a_silhouette_on_an_even_ground_is_the_object():
    image = np.full((1, 64, 64, 3), 220, np.uint8)
    image[0, 20:44, 20:44] = (30, 90, 40)
    black = silhouettes(image)[0, ..., 0] == 0
    assert black[24:40, 24:40].all()
    assert not black[:14].any()
    assert not black[:, 50:].any()


def test_quality_and_size_lose_detail_in_their_order():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)

    def lost(changed):
        return np.abs(changed.astype(int) - images).mean()

    assert lost(compress(images, 10)) > lost(compress(images, 60))
    assert lost(shrink(images, 4)) > lost(shrink(images, 2)) > 0


# ---- normalization


@pytest.fixture(scope="module")
def ants_and_bees(shared_data):
    paths = sorted((shared_data / "ants-bees" / "val").rglob("*.jpg"))[::9][:16]
    return np.stack([fit_to_input(decode(p.read_bytes(), min_side=448).pixels, InputSpec()) for p in paths])


def test_the_weights_remember_their_normalization(ants_and_bees):
    backbone = load_backbone("lite0")
    fits = statistics_fit(backbone, ants_and_bees)
    assert fits[0].is_declared
    assert fits[0].normalization == HALF
    wrong, text = misfit_sentence(fits)
    assert not wrong
    assert "mean 0.5, std 0.5" in text


def test_a_wrong_normalization_is_unmasked_in_words(ants_and_bees):
    backbone = load_backbone("lite0").with_spec(mean=IMAGENET.mean, std=IMAGENET.std)
    fits = statistics_fit(backbone, ants_and_bees)
    assert not fits[0].is_declared
    wrong, text = misfit_sentence(fits)
    assert wrong
    assert "probably wrong" in text
    assert "mean 0.5, std 0.5" in text


def test_untrained_weights_say_nothing_about_normalization(ants_and_bees):
    assert misfit_sentence(statistics_fit(load_backbone("random"), ants_and_bees)) is None


def test_renormalized_pixels_are_what_the_network_would_get():
    rng = np.random.default_rng(0)
    images, spec = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8), InputSpec(mean=HALF.mean, std=HALF.std)
    expected = (images / 255 - np.array(IMAGENET.mean)) / np.array(IMAGENET.std)
    inside = (renormalized(spec, IMAGENET)(images) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(inside, expected, atol=1e-5)
    assert HALF not in alternatives(spec)
    assert IMAGENET in alternatives(spec)
