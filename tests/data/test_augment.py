"""Random views: their shape, their stream, and that torchvision's own transforms are what is carried out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topwork.data.augment import PIPELINES, ColorJitter, Flip, ResizedCrop, TrivialAugment, pipeline, stream
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


def test_flip_mirrors() -> None:
    pixels = photo()
    np.testing.assert_array_equal(Flip(1.0)(pixels, stream(0, 0, "a"), SPEC), pixels[:, ::-1])
    np.testing.assert_array_equal(Flip(1.0, vertical=True)(pixels, stream(0, 0, "a"), SPEC), pixels[::-1])
    np.testing.assert_array_equal(Flip(0.0)(pixels, stream(0, 0, "a"), SPEC), pixels)


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
    import torch
    from torchvision.transforms.v2 import RandomResizedCrop

    theirs = RandomResizedCrop(32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [theirs.make_params([torch.zeros(3, 200, 300)]) for _ in range(3000)]
    reference = np.array([[d["height"] * d["width"], np.log(d["width"] / d["height"])] for d in drawn])
    rng = stream(0, 0, "a")
    ours = np.array([[w * h, np.log(w / h)] for _, _, w, h in (ResizedCrop().box(200, 300, rng) for _ in range(3000))])
    error = 4 * reference.std(0) / np.sqrt(3000) * np.sqrt(2)
    assert (abs(ours.mean(0) - reference.mean(0)) < error).all()


def test_color_jitter_changes_brightness_within_its_range() -> None:
    gray = np.full((8, 8, 3), 100, np.uint8)
    levels = [ColorJitter(0.3, 0, 0)(gray, stream(0, n, "a"), SPEC)[0, 0, 0] for n in range(200)]
    assert 69 <= min(levels) < 80
    assert 120 < max(levels) <= 130


def test_trivial_augment_uses_all_of_torchvisions_operations() -> None:
    from torchvision.transforms.v2 import TrivialAugmentWide

    asked: set[str] = set()

    class Listening(TrivialAugmentWide):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
            asked.add(transform_id)
            return super()._apply_image_or_video_transform(image, transform_id, magnitude, interpolation, fill)

    import torchvision.transforms.v2 as v2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "TrivialAugmentWide", Listening)
        for number in range(300):
            TrivialAugment()(photo(16, 16), stream(0, number, "a"), SPEC)
    assert asked == set(TrivialAugmentWide._AUGMENTATION_SPACE)


def test_names_join_and_wrong_names_are_named() -> None:
    joined = pipeline("random-resized-crop+flip")
    assert joined.crop == ResizedCrop()
    assert joined.steps == (Flip(),)
    with pytest.raises(UsageError, match="there is no 'mixup'"):
        pipeline("flip+mixup")
    with pytest.raises(UsageError, match="2 of these crop"):
        pipeline("light+standard")
