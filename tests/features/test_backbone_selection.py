"""The cheapest backbone that is not clearly worse is taken, and the words say why."""

from __future__ import annotations

import numpy as np
import pytest

from drawing import draw_folders
from topwork.commands.fit import fit
from topwork.errors import UsageError
from topwork.features.backbone_selection import Candidate, decide, names_of, subsample
from topwork.run import read_asked
from topwork.settings import FitSettings


def candidate(name, accuracy, rate):
    return Candidate(name, accuracy, 0.01, 1 - accuracy, rate, 1, 400)


def test_the_fastest_within_one_standard_error_of_the_best_is_taken():
    n = np.arange(400)
    right = [n < 380, n >= 21, n < 300]  # 95, 94.75, 75 %
    found = decide(
        [candidate("big", 0.95, 10), candidate("small", 0.9475, 100), candidate("tiny", 0.75, 1000)], right
    )  # fmt: skip
    assert found.name == "small"
    assert [c.chosen for c in found.candidates] == [False, True, False]
    assert "within one standard error of the most accurate one (big)" in found.words
    assert "tiny 75.0% at 1000 images/s" in found.words


def test_a_clear_lead_is_worth_its_cost():
    n = np.arange(400)
    found = decide([candidate("small", 0.9, 100), candidate("big", 0.95, 10)], [n < 360, n < 380])
    assert found.name == "big"
    assert "no faster one is within" in found.words


def test_subsamples_keep_every_class_and_their_shares():
    labels = np.repeat([0, 1, 2], [900, 90, 3])
    rows = subsample(labels, np.arange(993), seed=0, most=100)
    assert np.bincount(labels[rows]).tolist() == [91, 9, 2]
    assert subsample(labels, np.arange(50), seed=0, most=100).tolist() == list(range(50))


@pytest.mark.parametrize("names", ["a,,b", "a,a", ","])
def test_names_that_are_none_are_refused(names):
    with pytest.raises(UsageError, match="--backbone"):
        names_of(names)


def test_fit_takes_the_best_of_several_and_records_it(tmp_path):
    data = draw_folders(tmp_path / "data", n_each=10, shapes=("disc", "cross"))
    names = "random:test_efficientnet,random:test_resnet"
    fitted = fit(data, tmp_path / "run", FitSettings(backbone=names, size=64, near_duplicates=False, workers=1))
    assert fitted.recipe["backbone"] == fitted.recipe["backbones"]["name"]
    assert fitted.recipe["backbone"] in names.split(",")
    assert len(fitted.recipe["backbones"]["candidates"]) == 2
    assert fitted.recipe["backbones"]["words"].startswith("Backbone: random:test_")
    # what is resumed does not choose again
    assert read_asked(tmp_path / "run")[1].backbone == fitted.recipe["backbone"]
