"""Every study: what it teaches, what it costs, where it comes from. The study NAME is the module of that name here.

Only text, so that ``topwork study --list`` loads no network library.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable

from topwork.errors import UsageError
from topwork.studies.bench import Bench
from topwork.studies.study import Findings, Study

STUDIES = (
    Study(
        "normalization",
        "What does normalisation do?",
        "Pretrained weights expect pixels with one mean and deviation; train and test must agree on it.",
        "about a minute",
        "guns-and-knives tutorial: the 2 x 2 table of training and testing with and without it",
    ),
)


def study_named(name: str) -> Study:
    """The study of this name.

    Raises:
        UsageError: there is none, with the nearest names.
    """
    known = {study.name: study for study in STUDIES}
    if name not in known:
        near = difflib.get_close_matches(name, known, 2) or list(known)
        raise UsageError(f"{name}: no such study; did you mean {' or '.join(near)}? topwork study --list names them.")
    return known[name]


def runner_of(study: Study) -> Callable[[Bench], Findings]:
    """The function of a study."""
    module = importlib.import_module(f"topwork.studies.{study.name.replace('-', '_')}")
    run: Callable[[Bench], Findings] = module.run
    return run
