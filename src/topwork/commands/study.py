"""``topwork study``: runs an experiment of the tutorials on your images."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from topwork.progress import Reporter, default_reporter
from topwork.settings import StudySettings
from topwork.studies.bench import prepare
from topwork.studies.study import Findings, Study, runner_of, study_named


@dataclass(frozen=True, eq=False)
class Studied:
    """A study with its data, findings and running time."""

    study: Study
    path: str | None
    findings: Findings
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        about = asdict(self.study) | {"path": self.path, "seconds": round(self.seconds, 2)}
        return about | self.findings.as_dict()


def run_study(
    name: str,
    path: str | os.PathLike[str] | None = None,
    settings: StudySettings | None = None,
    *,
    reporter: Reporter | None = None,
) -> Studied:
    """Runs a study.

    Args:
        path: labeled images in any form that fit takes; None draws shapes.

    Raises:
        UsageError: no such study, or nothing usable at the path.
    """
    settings, reporter, study = settings or StudySettings(), reporter or default_reporter(), study_named(name)
    started = time.perf_counter()
    run = runner_of(study)
    reporter.step("scan")
    bench = prepare(path, settings, reporter)
    reporter.step(study.title)
    findings = run(bench)
    return Studied(study, None if path is None else str(path), findings, time.perf_counter() - started)
