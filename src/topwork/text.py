"""Formatting of names, numbers and lists, for the terminal, pages and documents.

In: values. Out: plain text, which pages escape again as HTML.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence


def escape(text: str) -> str:
    """A name that is safe in one terminal line: control characters and undecodable bytes become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def as_text(name: str) -> str:
    """A name for JSON and Parquet: bytes that are not valid Unicode become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def canonical(name: str) -> str:
    """A name in a canonical Unicode form for comparisons: macOS decomposes accents, tables compose them."""
    return unicodedata.normalize("NFC", name)


def quoted(name: str, longest: int = 48) -> str:
    """A name inside a sentence: in quotation marks, shortened if it is long."""
    text = escape(name)
    return f"“{text if len(text) <= longest else text[: longest - 1] + '…'}”"


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which ``image9`` comes before ``image10``; ties are broken by the text itself."""
    pieces = re.split(r"(\d{1,4000})", text)  # int() refuses longer numbers
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece.casefold()) for piece in pieces if piece], text


# ---- lists and counts


def first_names(names: Sequence[str], n: int = 5) -> str:
    """The first ``n`` names, escaped, and how many more there are."""
    text = ", ".join(escape(name) for name in names[:n])
    return text + (f" and {len(names) - n} more" if len(names) > n else "")


def join_names(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``1,234 images``."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


# ---- numbers


def percent(value: float | None, n_digits: int = 1) -> str:
    """``94.8%`` for 0.948; 0% and 100% only if it is exactly that; a dash if it was not measured."""
    number = _percent_number(value, n_digits)
    return number if number == "–" else f"{number}%"


def _percent_number(value: float | None, n_digits: int = 1) -> str:
    if value is None or math.isnan(value):
        return "–"
    number = round(100 * value, n_digits)
    step = 10.0**-n_digits
    if number >= 100 and value < 1:
        number = 100 - step
    elif number <= 0 and value > 0:
        number = step
    return f"{number:.{n_digits}f}"


def percent_ci(figure: Mapping[str, float | None] | float | None) -> str:
    """``94.8% (95% CI 91.2–97.0)`` for ``{"value", "low", "high"}``; ``94.8%`` for a number or an interval without width."""
    if not isinstance(figure, Mapping):
        return "not measured" if figure is None else percent(figure)
    value, low, high = figure.get("value"), figure.get("low"), figure.get("high")
    if value is None:
        return "not measured"
    ends = [] if low is None or high is None else [_percent_number(low), _percent_number(high)]
    return percent(value) + (f" (95% CI {'–'.join(ends)})" if len(set(ends)) > 1 else "")


def points(difference: float) -> str:
    """``+3.1`` or ``−0.4`` percentage points for a difference of shares; a true minus sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def decimal(value: float | None, n_digits: int = 3) -> str:
    """``0.172``; a dash if it was not measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.{n_digits}f}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3.1 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


# ---- values in a notebook


class Described:
    """A short ``repr`` and an HTML table for notebooks, both from :meth:`facts`."""

    def facts(self) -> dict[str, object]:
        """Short facts about the value."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """``Manifest(images: 120, classes: ants, bees)``, at most a few hundred characters."""
        found = [f"{name.lower()}: {_shortened(value)}" for name, value in self.facts().items()]
        return f"{type(self).__name__}({', '.join(found)})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(_shortened(value))}</td></tr>"
            for name, value in self.facts().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def _shortened(value: object, longest: int = 90) -> str:
    text = escape(str(value))
    return text if len(text) <= longest else text[: longest - 1] + "…"
