"""``topwork lr-range``: a curve, a suggestion with its reason, a plot; nothing else changes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from drawing import draw_folders
from terminal import topwork

OPTIONS = ("--backbone", "random:test_efficientnet", "--size", "32", "--batch-size", "8", "--workers", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_folders(tmp_path_factory.mktemp("data"), n_each=20, shapes=("disc", "cross"))


def test_it_suggests_a_rate_and_writes_only_the_plot(data, tmp_path):
    ended = topwork("lr-range", data, *OPTIONS, "--steps", 12, "--hidden", "8", "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert len(answer["rates"]) == len(answer["losses"]) <= 12
    assert f"{answer['suggestion']:.1e}" in answer["reason"]
    assert answer["option"].endswith(f":{answer['suggestion']:.1e}")
    assert not answer["head_is_fitted"]
    rates = {row["stage"]: row["rate"] for row in answer["stages"]}
    assert rates["classifier"] == pytest.approx(answer["suggestion"])
    assert rates["stem"] < rates["classifier"]
    written = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert written == [answer["plot"]]
    text = (tmp_path / answer["plot"]).read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert "suggested" in text


@pytest.mark.parametrize(
    ("options", "words"), [(("--steps", "3"), "10 steps"), (("--out", "a.png"), "must end in .svg")]
)
def test_wrong_use_is_named(data, tmp_path, options, words):
    ended = topwork("lr-range", data, *OPTIONS, *options, cwd=tmp_path)
    assert ended.returncode == 2
    assert words in ended.stderr
