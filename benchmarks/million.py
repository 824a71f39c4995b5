"""How time and memory grow with the number of images: small drawn images in Parquet, a tiny network, the whole fit.

    python benchmarks/million.py [10000 100000 1000000] [--classes 100]

Each size runs in a process of its own. Prints seconds per step, microseconds per image, CPU seconds (of all threads, which other work
on the machine changes less than the clock), peak memory, and the size of the report.
A tenth of a percent of the images are JPEG copies of others, at another quality; the share of them that is found is the recall.
Results: docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
SIDE = 32
ROWS = 5000  # per row group


def draw(path: Path, n: int, n_classes: int) -> int:
    """Writes n images; returns how many of them are copies of the one before."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import simplejpeg

    rng, n_copies = np.random.default_rng(0), 0
    schema = pa.schema([("image", pa.binary()), ("label", pa.string())])
    patterns = rng.integers(0, 256, (n_classes, 4, 4, 3))
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, n, ROWS):
            rows = min(ROWS, n - start)
            labels = rng.integers(0, n_classes, rows)
            noise = rng.normal(0, 60, (rows, 8, 8, 3))
            small = np.clip(patterns[labels].repeat(2, 1).repeat(2, 2) + noise, 0, 255).astype(np.uint8)
            large = small.repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)
            data = [simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=92) for image in large]
            for row in range(999, rows, 1000):
                data[row] = simplejpeg.encode_jpeg(np.ascontiguousarray(large[row - 1]), quality=80)
                labels[row] = labels[row - 1]
                n_copies += 1
            writer.write_table(pa.table([data, [f"class {label}" for label in labels]], schema=schema), ROWS)
    return n_copies


def measure(n: int, n_classes: int) -> None:
    """One size: prints a JSON object."""
    from topwork.commands.fit import fit
    from topwork.progress import Reporter
    from topwork.report.run_page import write_report
    from topwork.settings import FitSettings

    class Steps(Reporter):
        """Says on stderr when each step begins, for sizes that are stopped halfway."""

        def step(self, name: str) -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"{n:,}: {name} at {time.perf_counter() - started:.0f} s, {peak:.2f} GB so far",
                file=sys.stderr,
                flush=True,
            )

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        os.environ["TOPWORK_CACHE"] = f"{folder}/cache"
        path = Path(folder, "images.parquet")
        n_copies = draw(path, n, n_classes)
        started, cpu_started = time.perf_counter(), time.process_time()
        settings = FitSettings(backbone="random:test_efficientnet", size=SIDE)
        fitted = fit(path, Path(folder, "run"), settings, reporter=Steps())
        report_started = time.perf_counter()
        report = write_report(fitted.folder)
        seconds = {**fitted.evaluation["timing"]["seconds"], "report": round(time.perf_counter() - report_started, 1)}
        total = time.perf_counter() - started
        near = fitted.recipe["near_duplicates"]
        print(
            json.dumps(
                {
                    "images": n,
                    "microseconds_per_image": round(1e6 * total / n),
                    "cpu_seconds": round(time.process_time() - cpu_started, 1),
                    "seconds": seconds | {"total": round(total, 1)},
                    "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                    "report_mb": round(report.stat().st_size / 1e6, 1),
                    "manifest_mb": round((fitted.folder / "manifest.parquet").stat().st_size / 1e6, 1),
                    "predictions_mb": round((fitted.folder / "predictions.parquet").stat().st_size / 1e6, 1),
                    "insights_mb": round((fitted.folder / "insights.json").stat().st_size / 1e6, 1),
                    "copies": n_copies,
                    "near_pairs": near,
                    "accuracy": fitted.evaluation["test"]["accuracy"]["value"],
                }
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--one", action="store_true", help="in this process")
    asked = parser.parse_args()
    for n in asked.sizes:
        if asked.one:
            measure(n, asked.classes)
        else:
            subprocess.run([sys.executable, __file__, str(n), "--one", "--classes", str(asked.classes)], check=True)


if __name__ == "__main__":
    main()
