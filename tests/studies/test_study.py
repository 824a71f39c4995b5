"""Sentences of studies follow from the values: hand-set results, and what has to be said about them."""

from __future__ import annotations

import numpy as np
import pytest

from topwork.blocks import as_cell
from topwork.studies import data_size, normalization, rates, residual, scratch
from topwork.studies.learning import Epoch, Learned
from topwork.studies.study import Measured, best_of, compared, difference
from topwork.text import join_names, points


def right(n_right: int, n: int = 100):
    return np.arange(n) < n_right


def learned(name: str, n_right: int, loss: float = 1.0) -> Learned:
    epoch = Epoch(1, 2.0, loss, loss, right(n_right))
    return Learned(name, (epoch,), np.zeros((100, 2), np.float32), 10, 5)


def test_a_measured_share_has_wilsons_interval():
    found = Measured.of(right(95))
    assert (found.value, found.n) == (0.95, 100)
    assert (round(found.low, 3), round(found.high, 3)) == (0.888, 0.978)
    assert str(found) == "95.0% (88.8–97.8)"
    assert Measured.of(right(50)).overlaps(Measured.of(right(55)))
    assert not Measured.of(right(50)).overlaps(Measured.of(right(90)))


def test_equal_answers_do_not_differ_significantly():
    assert "No significant difference" in compared("a", right(90), "b", right(90))
    assert not difference(right(90), right(91)).is_clear


def test_a_clear_difference_names_the_better_one_whatever_the_order():
    assert "B is significantly better" in compared("a", right(60), "b", right(90))
    assert "A is significantly better" in compared("a", right(90), "b", right(60))


def test_the_numbers_of_a_sentence_are_those_of_the_answers():
    found = difference(right(60), right(90))
    text = compared("a", right(60), "b", right(90))
    assert found.value == pytest.approx(0.3)
    for part in ("90.0%", "60.0%", "+30.0", points(found.low), points(found.high)):
        assert part in text


def test_the_best_of_several_names_what_it_differs_from():
    text = best_of({"one": right(90), "two": right(89), "three": right(50)})
    assert text.startswith("Highest accuracy: one, 90.0%")
    assert "no significant difference from two on 100 images" in text
    assert "significantly better than three" in text
    assert best_of({"one": right(90), "two": right(89)}).endswith("no significant difference from two on 100 images.")
    assert "significantly better than all others" in best_of({"one": right(90), "two": right(50)})


def test_cells_and_lists_are_written_plainly():
    assert [as_cell(cell).text for cell in (1234, 0.00012345, None, "x")] == ["1,234", "0.0001234", "–", "x"]
    assert join_names(["a", "b", "c"]) == "a, b and c"


def table(with_unit: int, with_bytes: int, unit_unit: int):
    """Answers of a head trained on normalized images, and of one trained and tested on pixels from 0 to 1."""
    one, two = normalization.FORGOTTEN
    own = normalization.WITH
    return {
        (own, own): right(95), (own, one): right(with_unit), (own, two): right(with_bytes), (one, one): right(unit_unit),
    }  # fmt: skip


def test_normalization_says_what_it_costs_or_that_nothing_is_significant():
    first, second, third = normalization._sentences(table(95, 55, 94))
    assert "no significant difference" in first
    assert "95.0%" in second
    assert "55.0%" in second
    assert "−40.0 points" in second
    assert "costs accuracy" in second
    assert "no significant difference" in third
    first, _, third = normalization._sentences(table(60, 55, 60))
    assert "costs accuracy" in first
    assert "the head adjusts" in third


def test_scratch_says_better_only_if_it_is_significant():
    six = learned("six", 60), learned("six", 70)
    far = scratch._sentences(learned("pretrained", 95), {"six": six[0]}, {"six": six[1]}, 2, 0)
    assert "At equal epochs" in far[0]
    assert "Pretraining is significantly better" in far[0]
    assert "+25.0 points" in far[1]
    near = scratch._sentences(learned("pretrained", 95), {"six": learned("six", 94)}, {"six": learned("six", 94)}, 2, 0)
    assert all("No significant difference" in text for text in near[:2])
    ahead = learned("six", 95)
    behind = scratch._sentences(learned("pretrained", 50), {"six": ahead}, {"six": ahead}, 2, 0)
    assert "From scratch is significantly better" in behind[0]


def test_rates_says_so_if_nothing_differs():
    runs = {name: learned(name, n) for name, n in (("a", 90), ("b", 90), ("c", 90), ("d", 40), ("e", 91))}
    said = rates._sentences(runs, 0)
    assert "No significant difference" in said[0]
    assert "−50.0 points" in said[2]
    assert said[3].endswith("no significant difference.")


def measurement(kind: str, depth: int, first: float) -> residual.Measurement:
    return residual.Measurement(kind, depth, [first, 1.0], [first, 1.0], learned(kind, 50))


def test_residual_says_decays_only_where_it_does():
    found = [measurement("plain", 4, 1.0), measurement("plain", 32, 1e-6), measurement("residual", 4, 1.0), measurement("residual", 32, 0.5)]  # fmt: skip
    plain, skip = residual._gradient_sentences(found)
    assert "1e-6 times with 32" in plain
    assert "it decays with depth, by 6 orders of magnitude" in plain
    assert "it does not decay, it stays within a factor of 2.0" in skip
    assert "No significant difference" in residual._training_sentence(found)


def test_the_padding_sentence_is_read_off_the_table():
    rows = [residual._kernel_row(k) for k in residual.KERNELS]
    text = residual.padding_sentence(rows)
    assert "kernel - 2 gives that for 3 only" in text
    assert "kernel // 2 for 1, 3, 5, 7;" in text


@pytest.mark.parametrize(("n", "is_half"), [(50, True), (45, False), (33, False)])
def test_half_as_many_images_are_half(n: int, is_half: bool) -> None:
    said = data_size._sentences({n: right(80), 100: right(90)}, None, 2, 0)
    assert (f"half as many ({n})" in " ".join(said).lower()) == is_half
