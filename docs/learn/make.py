"""Updates the results and plots of these pages: ``python docs/learn/make.py DATA [NAME ...]``.

Runs the command under "Results" of each page in the folder DATA, which contains caltech-mini and ants-bees.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = re.compile(r"(## Results\n\n```\n(topwork study (\S+) .*?)\n```\n\n)(.*?)\n\n((?:- .*\n)+)")
PLOT = re.compile(r"!\[.*?\]\((\S+)\)")


def renew(page: Path, data: Path) -> None:
    """Runs the study of a page and replaces the results in it."""
    text = page.read_text(encoding="utf-8")
    found = RESULTS.search(text)
    if found is None:
        return
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", *shlex.split(found[2]), "--out", out]
        subprocess.run(command, check=True, cwd=data)
        study = json.loads((Path(out) / f"{found[3]}.json").read_text(encoding="utf-8"))
        for name in PLOT.findall(text):
            shutil.copy(Path(out) / name, HERE / name)
    sentences = "".join(f"- {sentence}\n" for sentence in study["sentences"])
    page.write_text(text[: found.start(5)] + sentences + text[found.end(5) :], encoding="utf-8")


if __name__ == "__main__":
    for path in sorted(HERE.glob("[01]*.md")):
        if not sys.argv[2:] or path.stem.partition("-")[2] in sys.argv[2:]:
            renew(path, Path(sys.argv[1]))
