import numpy as np
import pytest
import threadpoolctl

from topwork.features.logistic import SMALL_VALUES, few_threads


def threads():
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


def test_small_problems_get_one_thread_and_then_all_come_back():
    np.ones((2, 2)) @ np.ones((2, 2))
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if threads() != {2}:
            pytest.skip("linear algebra here knows no threads")
        with few_threads(SMALL_VALUES):
            assert threads() == {1}
        assert threads() == {2}
        with few_threads(SMALL_VALUES + 1):
            assert threads() == {2}
