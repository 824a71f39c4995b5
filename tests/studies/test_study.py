"""Sentences of studies follow from the values: hand-set results, and what has to be said about them."""

from __future__ import annotations

import numpy as np
import pytest

from topwork.blocks import as_cell
from topwork.studies import residual, scratch
from topwork.studies.learning import Epoch, Learned
from topwork.studies.study import best_of, compared, difference, measured
from topwork.text import join_names, points


def right(n_right: int, n: int = 100):
    return np.arange(n) < n_right


def learned(name: str, n_right: int, loss: float = 1.0) -> Learned:
    return Learned(name, (Epoch(1, 2.0, loss, right(n_right)),), 10, 5)


def test_a_measured_share_has_wilsons_interval():
    found = measured(right(95))
    assert (found.value, found.n) == (0.95, 100)
    assert (round(found.low, 3), round(found.high, 3)) == (0.888, 0.978)
    assert str(found) == "95.0% (88.8–97.8)"


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


def test_scratch_says_better_only_if_it_is_significant():
    def said(pretrained: int, equal_epochs: int, equal_time: int) -> list[str]:
        groups = {
            "equal epochs": {"six": learned("six", equal_epochs)},
            "equal time": {"six": learned("six", equal_time)},
        }
        return scratch._sentences(learned("pretrained", pretrained), groups, 2, 0)

    far = said(95, 60, 70)
    assert far[0].startswith(
        "At equal epochs: Pretrained vs. six, the best from scratch: 95.0% vs. 60.0% accuracy, +35.0 points"
    )
    assert "Pretrained is significantly better" in far[0]
    assert "+25.0 points" in far[1]
    assert all("No significant difference" in text for text in said(95, 94, 94)[:2])
    guessing = said(95, 50, 95)
    assert "no better than guessing (50.0%): six" in guessing[-1]


def measurement(kind: str, depth: int, first: float) -> residual.Measurement:
    return residual.Measurement(kind, depth, [first, 1.0], [first, 1.0], learned(kind, 50))


def test_residual_says_decays_only_where_it_does():
    found = [measurement("plain", 4, 1.0), measurement("plain", 32, 1e-6), measurement("residual", 4, 1.0), measurement("residual", 32, 0.5)]  # fmt: skip
    plain, skip = residual._gradient_sentences(found)
    assert "1e-06 times with 32" in plain
    assert "it decays with depth" in plain
    assert "it does not decay with depth" in skip


def test_the_padding_sentence_is_read_off_the_table():
    rows = [residual._kernel_row(k) for k in residual.KERNELS]
    text = residual.padding_sentence(rows)
    assert "kernel - 2 works for 3 only" in text
    assert "kernel // 2 for 1, 3, 5, 7;" in text
