"""What a look at the data finds, misses and costs: every figure of the scan, with one command.

    python benchmarks/scan.py CALTECH-MINI ANTS-BEES [--only layouts duplicates leak shortcuts hostile cost] [--images 10000]

CALTECH-MINI and ANTS-BEES are folders of small photographs (20 classes of 40; train/ and val/ of two classes).

layouts     the same images as folders, split folders, CSV, Parquet, flat, tar, zip ...: manifest digest, test accuracy
duplicates  40 planted copies (resized, compressed anew, cropped, mirrored): found, false groups, pairs across the split
leak        copies of training images planted into a given test part: found, and the test score with and without them
shortcuts   what is flagged on the data as they are, and after one class got a JPEG quality or a gray border of its own
hostile     1,000 classes of two, names that lead outside or hold markup, an archive with ../ and a link in it
cost        time of ``scan`` over that of embedding alone, cold, for many images that are no copies of each other; of the
            clock, and of the processor, which other work on the machine disturbs less

Measured figures and the machine they come from stand in docs/lab-log.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
import layouts as written

PARTS = ("layouts", "duplicates", "leak", "shortcuts", "hostile", "cost")
FRACTIONS = {"valid_fraction": 0.25, "test_fraction": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caltech_mini", type=Path)
    parser.add_argument("ants_bees", type=Path)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--images", type=int, default=10_000, help="of the cost")
    parser.add_argument("--many", type=Path, help="folder to make those images in, or to find them in")
    parser.add_argument("--seed", type=int, default=0, help="of what is planted")
    parser.add_argument("--f32", action="store_true", help="as on a processor without bf16")
    arguments = parser.parse_args()
    if arguments.f32:
        from topwork.features import engine

        engine._precisions = lambda: ["f32"]
    measures: dict[str, Callable[[argparse.Namespace, Path], None]] = {
        "layouts": measure_layouts,
        "duplicates": measure_duplicates,
        "leak": measure_leak,
        "shortcuts": measure_shortcuts,
        "hostile": measure_hostile,
        "cost": measure_cost,
    }
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("TOPWORK_CACHE", f"{scratch}/cache")
        for name in arguments.only:
            print(f"\n{name}", flush=True)
            folder = Path(scratch, name)
            folder.mkdir()
            measures[name](arguments, folder)


# ---- layouts


def measure_layouts(arguments: argparse.Namespace, scratch: Path) -> None:
    """Prints digest and test accuracy of the same images in every form."""
    from topwork.commands.fit import fit
    from topwork.settings import FitSettings

    images = written.read_folders(arguments.caltech_mini)
    settings = FitSettings(**FRACTIONS)
    first = fit(arguments.caltech_mini, scratch / "run", settings)
    _layout_line("folders", first)
    forms = {name: write for name, write in written.LAYOUTS.items() if name != "folders"}
    found = {(first.manifest.digest, first.evaluation["test"]["accuracy"]["value"])}
    for name, write in {**forms, "split folders": None}.items():
        place = scratch / name.replace(" ", "_")
        path = write(images, place) if write else _split_folders(first, place)
        regex = {"label_regex": r"(.+)_\d+"} if name == "flat" else {}
        fitted = fit(path, scratch / f"{place.name}.run", FitSettings(**FRACTIONS, **regex))
        _layout_line(name, fitted)
        found.add((fitted.manifest.digest, fitted.evaluation["test"]["accuracy"]["value"]))
    print(f"  {'all the same' if len(found) == 1 else 'THEY DIFFER'}")


def _layout_line(name: str, fitted: object) -> None:
    test, manifest = fitted.evaluation["test"], fitted.manifest  # type: ignore[attr-defined]
    accuracy = test["accuracy"]["value"]
    print(f"  {name:20s} {len(manifest.samples)} images  {manifest.digest[:12]}  {100 * accuracy:.2f} %", flush=True)


def _split_folders(fitted: object, root: Path) -> Path:
    """The images in train/valid/test folders, divided as a fit divided them."""
    manifest = fitted.manifest  # type: ignore[attr-defined]
    for part, rows in fitted.split.parts().items():  # type: ignore[attr-defined]
        for row in rows.tolist():
            path = root / part / manifest.samples[row].path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(manifest.read(row))
    return root


# ---- copies


def measure_duplicates(arguments: argparse.Namespace, scratch: Path) -> None:
    """Prints recall and false groups of 40 planted copies."""
    from topwork.data.split import join_groups, split

    own = _pairs(arguments.caltech_mini)[1]
    paths = sorted(arguments.caltech_mini.glob("*/*.jpg"))[arguments.seed % 20 :: 20][:40]
    rng = np.random.default_rng(arguments.seed)
    root, planted = _copied(arguments.caltech_mini, scratch / "data"), []
    for number, path in enumerate(paths):
        source = root / path.relative_to(arguments.caltech_mini)
        copy = source.with_name(f"{source.stem} copy.jpg")
        copy.write_bytes(_changed(source, number % 4, rng))
        planted.append({str(p.relative_to(root)) for p in (source, copy)})
    manifest, pairs, rows = _pairs(root)
    groups = join_groups(manifest, rows)
    group_of = {sample.path: group for sample, group in zip(manifest.samples, groups, strict=True)}
    hits = [len({group_of[path] for path in pair}) == 1 for pair in planted]
    wanted = {frozenset(pair) for pair in planted}
    touched = {path for pair in planted for path in pair}
    false = {group_of[next(iter(pair))] for pair in pairs - own - wanted if not pair & touched}
    parts = split(manifest, groups=groups)
    part_of = {manifest.samples[r].path: name for name, some in parts.parts().items() for r in some.tolist()}
    across = sum(len({part_of[path] for path in pair}) > 1 for pair in planted)
    print(f"  {sum(hits)} of {len(planted)} copies found ({100 * np.mean(hits):.1f} %), {len(false)} false groups,")
    print(f"  {len(own)} pairs of the data's own, {across} planted pairs across the split")


def _pairs(root: Path) -> tuple:  # type: ignore[type-arg]
    """Manifest, near-duplicate pairs by path, and by row."""
    from topwork.data.manifest import scan
    from topwork.features.duplicates import near_duplicates
    from topwork.features.embed import Embedder, embed
    from topwork.models.backbone import load_backbone

    embedder = Embedder(load_backbone("auto"))
    manifest = scan(root, visitor=embedder)
    embedder.flush()
    near = near_duplicates(manifest, embed(embedder.backbone, manifest, embedder=embedder), embedder)
    rows = [(pair.a, pair.b) for pair in near.pairs]
    return manifest, {frozenset(manifest.samples[row].path for row in pair) for pair in rows}, rows


def _copied(source: Path, target: Path) -> Path:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


def _changed(path: Path, kind: int, rng: np.random.Generator) -> bytes:
    """Resized, compressed anew, cropped by up to 6 % a side, or mirrored."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if kind == 0:
        scale = rng.uniform(0.4, 0.8)
        return _jpeg(image.resize((round(scale * width), round(scale * height)), Image.Resampling.LANCZOS), 88)
    if kind == 1:
        return _jpeg(image, int(rng.integers(40, 70)))
    if kind == 2:
        left, top, right, bottom = rng.uniform(0.01, 0.06, 4) * [width, height, width, height]
        return _jpeg(image.crop((int(left), int(top), int(width - right), int(height - bottom))), 90)
    return _jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 92)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def measure_leak(arguments: argparse.Namespace, scratch: Path) -> None:
    """Prints what a fit says about copies of training images in a given test part."""
    from topwork.commands.fit import fit
    from topwork.settings import FitSettings

    first = fit(arguments.caltech_mini, scratch / "first", FitSettings(**FRACTIONS))
    root = _split_folders(first, scratch / "data")
    rng = np.random.default_rng(arguments.seed)
    sources = sorted((root / "train").glob("*/*.jpg"))[:: len(first.split.train) // 12][:12]
    for number, source in enumerate(sources):
        target = root / "test" / source.parent.name / f"{source.stem} again.jpg"
        target.write_bytes(_changed(source, number % 4, rng))
    fitted = fit(root, scratch / "run", FitSettings())
    leaks = fitted.evaluation["leaks"]["test"]
    names = {pair[0] for pair in leaks["pairs"]}
    n_found = sum(" again" in name for name in names)
    print(f"  {n_found} of {len(sources)} planted leaks found, {leaks['n_leaked'] - n_found} others")
    for key in ("with", "without"):
        accuracy = leaks[key]["accuracy"]
        print(
            f"  {key:8s} them: {100 * accuracy['value']:.2f} % ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})"
        )


# ---- shortcuts


def measure_shortcuts(arguments: argparse.Namespace, scratch: Path) -> None:
    """Prints the warnings on the data as they are and after one class was marked."""
    for root in (arguments.caltech_mini, arguments.ants_bees):
        _shortcut_line(f"{root.name} as it is", root)
        name = min(p.name for p in root.rglob("*") if p.is_dir() and any(p.glob("*.jpg")))
        for kind, mark in {"at JPEG quality 60": _requantized, "with a gray border": _bordered}.items():
            copy = _copied(root, scratch / f"{root.name} {kind}")
            for path in copy.rglob("*.jpg"):
                if path.parent.name == name:
                    path.write_bytes(mark(path))
            _shortcut_line(f"{root.name}, {name} {kind}", copy)


def _requantized(path: Path) -> bytes:
    return _jpeg(Image.open(path).convert("RGB"), 60)


def _bordered(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    side = max(4, min(image.size) // 25)
    canvas = Image.new("RGB", image.size, (128, 128, 128))
    canvas.paste(image.crop((side, side, image.width - side, image.height - side)), (side, side))
    return _jpeg(canvas, 90)


def _shortcut_line(title: str, root: Path) -> None:
    from topwork.commands.scan import survey
    from topwork.settings import ScanSettings

    warnings = survey(root, ScanSettings(quick=True)).overview.shortcuts.warnings
    print(f"  {title}: {' | '.join(warnings) or 'no warning'}", flush=True)


# ---- hostile names


def measure_hostile(_: argparse.Namespace, scratch: Path) -> None:
    """Prints how scan ends on many small classes, on names that could do harm, and on an archive that leads outside."""
    noise = np.random.default_rng(0)
    images = {f"class {number:04d}": {f"{k}.png": _drawn(noise) for k in range(2)} for number in range(1000)}
    _scan_line("1,000 classes of two", written.folders(images, scratch / "many"))
    table = scratch / "names" / "data.csv"
    written.csv_table(
        {name: {f"{k}.png": _drawn(noise) for k in range(12)} for name in ("../x", "<script>", "plain")}, table.parent
    )
    _scan_line("classes ../x and <script>", table, "--report", str(scratch / "page.html"))
    print(f"    markup in the page: {'<script' in (scratch / 'page.html').read_text()}")
    with tarfile.open(scratch / "hostile.tar", "w") as file:
        for label in ("good", "better"):
            for number in range(12):
                written.add(file, f"{label}/{number}.png", _drawn(noise))
        written.add(file, "../../evil.jpg", _drawn(noise))
        written.add(file, "good/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        written.add(file, "/good/absolute.jpg", _drawn(noise))
    _scan_line("archive with ../../evil.jpg and a link", scratch / "hostile.tar")
    evil = [path for path in (scratch / "../../evil.jpg", scratch / "../evil.jpg") if path.exists()]
    print(f"    written outside: {evil or 'nothing'}")


def _drawn(noise: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _scan_line(title: str, path: Path, *options: str) -> None:
    command = [sys.executable, "-m", "topwork.cli", "scan", str(path), "--json", "--quiet", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    rejects = "; ".join(f"{r['path']}: {r['reason']}" for r in answer["rejects"])
    print(f"  {title}: status {done.returncode}, {len(answer['classes'])} classes, {answer['n_used']} images used")
    if rejects:
        print(f"    rejects: {rejects}", flush=True)


# ---- cost


def measure_cost(arguments: argparse.Namespace, scratch: Path) -> None:
    """Prints seconds of embedding alone and of the whole scan, each with an empty cache."""
    from topwork.commands.scan import survey
    from topwork.data.listing import list_data, read_image
    from topwork.data.loader import FactsStore, load_images
    from topwork.features.embed import Embedder
    from topwork.models.backbone import load_backbone
    from topwork.settings import ScanSettings

    root = arguments.many or scratch / "data"
    if not root.exists():
        _make_many(arguments, root)
    load_backbone("auto")  # prepared once for good, like the network's compiled form

    def embed_alone() -> tuple[float, float]:
        os.environ["TOPWORK_CACHE"] = str(scratch / "alone")
        embedder = Embedder(load_backbone("auto"))
        started, cpu = time.perf_counter(), time.process_time()
        listing = list_data(root)
        for loaded in load_images(
            listing.entries, lambda entry: read_image(listing.root, entry.path), FactsStore(scratch / "alone"), embedder
        ):
            if loaded.pixels is not None:
                embedder.take(loaded.content_hash, loaded.pixels)
        embedder.flush()
        return time.perf_counter() - started, time.process_time() - cpu

    def whole_scan() -> tuple[float, float, dict[str, float]]:
        os.environ["TOPWORK_CACHE"] = str(scratch / "scan")
        reporter = Steps()
        started, cpu = time.perf_counter(), time.process_time()
        survey(root, ScanSettings(), reporter=reporter)
        seconds = reporter.seconds()
        return time.perf_counter() - started - seconds["backbone"], time.process_time() - cpu, seconds

    for cache in ("alone", "scan"):
        os.environ["TOPWORK_CACHE"] = str(scratch / cache)
        Embedder(load_backbone("auto"))
    n = sum(1 for path in root.rglob("*") if path.is_file())
    (alone, alone_cpu), (scanned, scanned_cpu, steps) = embed_alone(), whole_scan()
    print(f"  {n:,} images: embedding alone {alone:.1f} s, scan {scanned:.1f} s: {scanned / alone:.3f} times")
    print(f"  of the processor: {alone_cpu:.1f} s, {scanned_cpu:.1f} s: {scanned_cpu / alone_cpu:.3f} times")
    print("  steps: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in steps.items()))


class Steps:
    """A reporter that keeps the time of each step."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, float]] = []

    def step(self, name: str) -> None:
        """A step begins."""
        self.starts.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each step so far."""
        ends = [start for _, start in self.starts[1:]] + [time.perf_counter()]
        return {name: end - start for (name, start), end in zip(self.starts, ends, strict=True)}

    def progress(self, n_done: int, n_all: int) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Not shown."""

    def epoch(self, record: dict[str, object]) -> None:
        """Not shown."""


def _make_many(arguments: argparse.Namespace, root: Path) -> None:
    """Windows of half to four fifths of each side of the photographs, turned and lit at random: no two are the same."""
    sources = sorted([*arguments.caltech_mini.rglob("*.jpg"), *arguments.ants_bees.rglob("*.jpg")])
    rng = np.random.default_rng(0)
    for number in range(arguments.images):
        source = sources[number % len(sources)]
        image = Image.open(source).convert("RGB")
        image.draft("RGB", (600, 600))
        size = image.size
        share = rng.uniform(0.5, 0.8, 2)
        left, top = rng.uniform(0, 1 - share) * size
        box = (left, top, left + share[0] * size[0], top + share[1] * size[1])
        image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR).resize(
            size, Image.Resampling.BILINEAR, box
        )
        target = root / source.parent.name / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_jpeg(image, int(rng.integers(80, 95))))


if __name__ == "__main__":
    main()
