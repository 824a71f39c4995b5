"""Random views: their shape, their stream, and that they are what torchvision's transforms make."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from topwork.data.augment import (
    PIPELINES,
    TRIVIAL,
    ColorJitter,
    Draw,
    Flip,
    ResizedCrop,
    TrivialAugment,
    _hue,
    _rotation,
    _saturation,
    apply,
    pipeline,
    stream,
)
from topwork.data.transforms import InputSpec, fit_to_input
from topwork.errors import UsageError

SPEC = InputSpec(height=48, width=64)


def photo(height: int = 90, width: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_gives_input_sized_views_that_differ_between_epochs(name: str) -> None:
    views = [pipeline(name).view(photo(), SPEC, stream(0, epoch, "a")) for epoch in range(12)]
    assert all(view.shape == (48, 64, 3) and view.dtype == np.uint8 for view in views)
    distinct = len({view.tobytes() for view in views})
    assert distinct == 1 if name == "none" else distinct > 1


def test_none_is_the_view_of_prediction() -> None:
    view = pipeline("none").view(photo(), SPEC, stream(0, 0, "a"))
    np.testing.assert_array_equal(view, fit_to_input(photo(), SPEC))


def test_views_depend_on_seed_epoch_and_sample_and_not_on_threads() -> None:
    def view(epoch: int) -> bytes:
        return pipeline("trivial+rotation").view(photo(), SPEC, stream(3, epoch, "b")).tobytes()

    one_by_one = [view(epoch) for epoch in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(view, range(24))) == one_by_one
    draws = {stream(seed, epoch, name).random() for seed in (0, 1) for epoch in (0, 1) for name in ("a", "b")}
    assert len(draws) == 8


def test_flips_both_ways_and_quarter_turns_show_all_eight_positions_and_keep_the_pixels() -> None:
    how, square = pipeline("flip+vertical-flip+quarter-turns"), InputSpec(height=16, width=16)
    pixels = photo(16, 16)
    assert len({how.view(pixels, square, stream(0, n, "a")).tobytes() for n in range(200)}) == 8
    wide = InputSpec(height=8, width=16)
    views = [how.view(photo(8, 16), wide, stream(0, n, "a")) for n in range(20)]
    assert {view.shape for view in views} == {(8, 16, 3)}
    assert len({view.tobytes() for view in views}) == 4


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([ResizedCrop(), ResizedCrop((0.8, 1.0)), ResizedCrop((1.0, 1.0), (1.0, 1.0))]),
    st.integers(0, 50),
)
def test_boxes_lie_inside_and_keep_their_ranges(height: int, width: int, crop: ResizedCrop, seed: int) -> None:
    left, top, w, h = crop.box(height, width, stream(seed, 0, "a"))
    assert left >= 0
    assert top >= 0
    assert 1 <= w <= width - left + 1e-9
    assert 1 <= h <= height - top + 1e-9
    if min(height, width) >= 100 and max(height, width) <= 1.2 * min(height, width) and crop == ResizedCrop():
        assert 0.07 < w * h / (height * width) <= 1.0
        assert 0.72 < w / h < 1.39


def test_boxes_are_spread_as_torchvision_spreads_them() -> None:
    """Same mean area and aspect as RandomResizedCrop over many draws."""
    reference_crop = v2.RandomResizedCrop(32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [reference_crop.make_params([torch.zeros(3, 200, 300)]) for _ in range(3000)]
    reference = np.array([[d["height"] * d["width"], np.log(d["width"] / d["height"])] for d in drawn])
    rng = stream(0, 0, "a")
    ours = np.array([[w * h, np.log(w / h)] for _, _, w, h in (ResizedCrop().box(200, 300, rng) for _ in range(3000))])
    error = 4 * reference.std(0) / np.sqrt(3000) * np.sqrt(2)
    assert (abs(ours.mean(0) - reference.mean(0)) < error).all()


def made(draw: Draw, pixels: np.ndarray) -> np.ndarray:
    spec = InputSpec(height=pixels.shape[0], width=pixels.shape[1])
    return apply(torch.from_numpy(pixels)[None], [draw], spec)[0].numpy()


def theirs(pixels: np.ndarray, function, *values, **options) -> np.ndarray:
    return function(torch.from_numpy(pixels).permute(2, 0, 1), *values, **options).permute(1, 2, 0).numpy()


def test_color_jitter_changes_brightness_within_its_range() -> None:
    gray = np.full((8, 8, 3), 100, np.uint8)
    levels = []
    for n in range(200):
        ColorJitter(0.3, 0, 0)(draw := Draw(), stream(0, n, "a"), SPEC)
        levels.append(made(draw, gray)[0, 0, 0])
    assert 69 <= min(levels) < 80
    assert 120 < max(levels) <= 130


@pytest.mark.parametrize("factor", [0.3, 1.6])
def test_color_and_contrast_are_torchvisions(factor: float) -> None:
    pixels = photo(16, 16)
    for draw, function in (
        (Draw(color=_saturation(factor)), functional.adjust_saturation),
        (Draw(color=factor * np.eye(3)), functional.adjust_brightness),
        (Draw(contrast=factor), functional.adjust_contrast),
    ):
        difference = np.abs(made(draw, pixels).astype(int) - theirs(pixels, function, factor))
        assert difference.max() <= 2, function
    gray = np.repeat(photo(8, 8)[..., :1], 3, axis=2)
    assert np.abs(made(Draw(color=_hue(0.2)), gray).astype(int) - gray).max() <= 1
    red = np.full((1, 1, 3), (200, 0, 0), np.uint8)
    assert made(Draw(color=_hue(1 / 3)), red)[0, 0].argmax() != 0


def test_a_rotation_and_a_shear_are_torchvisions_and_show_the_background() -> None:
    smooth = np.kron(photo(4, 6), np.ones((16, 16, 1), np.uint8))
    spec = InputSpec(height=64, width=96)
    for degrees in (30.0, -100.0):
        draw = Draw()
        draw.place(_rotation(degrees), spec)
        fill = [float(c) for c in spec.background]
        bilinear = v2.InterpolationMode.BILINEAR
        expected = min(
            np.abs(
                made(draw, smooth).astype(int) - theirs(smooth, functional.rotate, sign * degrees, bilinear, fill=fill)
            ).mean()
            for sign in (1, -1)
        )
        assert expected < 3
        assert (made(draw, smooth)[0, 0] == spec.background).all()


def test_trivial_augment_draws_all_of_its_operations_as_often_and_as_strong_as_torchvision() -> None:
    seen, pixels = set(), photo(16, 16)
    for number in range(400):
        TrivialAugment()(draw := Draw(), stream(0, number, "a"), SPEC)
        view = made(draw, pixels)
        assert view.shape == pixels.shape
        kind = "affine" if not np.array_equal(draw.affine, np.eye(3)) else "contrast" if draw.contrast != 1 else "color"
        seen.add(draw.operation[0] if draw.operation else kind)
    assert seen == {"affine", "contrast", "color", "sharpness", "posterize", "solarize", "autocontrast", "equalize"}
    assert len(TRIVIAL) == len(v2.TrivialAugmentWide._AUGMENTATION_SPACE) == 14


def test_a_batch_of_views_is_the_views_one_by_one() -> None:
    pixels, how = torch.from_numpy(np.stack([photo(56, 74), photo(56, 74)[::-1]])), pipeline("trivial+rotation")
    draws = [how.draw(SPEC, stream(0, epoch, "a")) for epoch in range(2)]
    together = apply(pixels, draws, SPEC)
    for row in range(2):
        np.testing.assert_array_equal(together[row], apply(pixels[row : row + 1], draws[row : row + 1], SPEC)[0])


def test_names_join_and_wrong_names_are_named() -> None:
    joined = pipeline("random-resized-crop+flip")
    assert joined.steps == (ResizedCrop(), Flip())
    with pytest.raises(UsageError, match="no such augmentation: 'mixup'"):
        pipeline("flip+mixup")
    with pytest.raises(UsageError, match="2 of these crop"):
        pipeline("light+standard")
