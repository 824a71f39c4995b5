"""One rule for "better": known by hand, and a single image never decides."""

import math

import numpy as np
import pytest

from topwork.paired import is_clearly_better, paired


def test_mean_and_error_by_hand():
    gain = paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert gain.mean == 2.0
    assert gain.error == pytest.approx(1.0 / math.sqrt(3))  # spread of 2, 3, 1 is 1
    assert is_clearly_better(gain, 3.0)
    assert not is_clearly_better(gain, 4.0)
    assert not is_clearly_better(gain, 1.0, least=2.5)


def test_weights_count_as_shares_and_weight_zero_as_absence():
    first, second = [1.0, 2.0, 3.0, 0.0], [0.5, 2.5, 2.0, 9.0]
    assert paired(first, second, [1, 1, 1, 0]) == pytest.approx(paired(first[:3], second[:3]))


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_one_image_is_never_clear_and_two_are(n):
    right = np.zeros(n)
    right[0] = 1
    assert not is_clearly_better(paired(right, np.zeros(n)))
    if n > 2:
        right[1] = 1
        assert is_clearly_better(paired(right, np.zeros(n)))


def test_equal_and_too_few_are_not_clear():
    assert not is_clearly_better(paired([1.0, 1.0], [1.0, 1.0]))
    assert not is_clearly_better(paired([5.0], [0.0]))
    assert not is_clearly_better(paired([], []))


def test_the_error_of_a_single_image_is_not_printed():
    assert paired([1.0, 2.5, 2.0], [3.0, 4.0, 4.0]).words(2) == "1.83 ± 0.17"
    assert paired([1.0], [3.0]).words(2) == "2.00 on a single image"
