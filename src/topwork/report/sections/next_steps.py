"""Next steps: what would help most, with the expected gain, the time it takes, and the command."""

from __future__ import annotations

from topwork.blocks import Block, Command, Fold, Heading, Text
from topwork.evaluation.advice import Advice, times
from topwork.evaluation.analysis import advice_of
from topwork.report.pictures import Album
from topwork.report.run_data import Record
from topwork.report.sections.summary import expected_gain
from topwork.text import escape

N_OPEN = 3
BASIS = {
    "curve": "from this data's learning curve",
    "elsewhere": "measured on other datasets",
    "bound": "an upper bound",
}


def next_steps(record: Record, _album: Album) -> list[Block]:
    """The largest expected gain first."""
    found = [_blocks(number, item) for number, item in enumerate(advice_of(record.insights), start=1)]
    blocks = [block for one in found[:N_OPEN] for block in one]
    rest = [block for one in found[N_OPEN:] for block in one]
    return [*blocks, Fold(f"{len(found) - N_OPEN} more", rest)] if rest else blocks


def _blocks(number: int, item: Advice) -> list[Block]:
    gain = f"{expected_gain(item)}, {BASIS.get(item.basis or '', '')}" if item.gain else "more reliable numbers"
    blocks: list[Block] = [
        Heading(f"{number}. {escape(item.title)}"),
        Text(escape(item.text)),
        Text(f"Gain: {gain}. Takes {times(item)}.", "small"),
    ]
    return [*blocks, *([Command(escape(item.command), f"Command: {escape(item.title)}")] if item.command else [])]
