"""Output on a terminal: sentences break between words, tables and commands do not break."""

from __future__ import annotations

import io

import pytest

from topwork.console import model_list_lines, wrapped


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_sentences_break_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    note = "  - Too few images to calibrate ambiguous answers, so every image gets a label."
    table = "class  train images  evaluated on  precision"
    command = "Retrain: topwork fit photos --corrections corrections.csv"
    shown = wrapped(f"{note}\n{table}\n{command}", Screen())
    assert shown.splitlines() == [
        "  - Too few images to",
        "    calibrate ambiguous",
        "    answers, so every image",
        "    gets a label.",
        table,
        command,
    ]
    assert wrapped(note, io.StringIO()) == note


@pytest.mark.parametrize(("pattern", "advice"), [("resnet", "*resnet*"), ("*resnot*", "*resnet*")])
def test_a_filter_without_models_is_answered_with_another_one(pattern: str, advice: str) -> None:
    (line,) = model_list_lines({"backbones": [], "timm": []}, pattern)
    assert line.endswith(f"try '{advice}'.")
