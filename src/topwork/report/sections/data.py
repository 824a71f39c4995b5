"""Data: used and rejected images, images per class and part, examples, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from topwork.blocks import AnyCell, Block, Card, Facts, Fold, Gallery, Notes, Stack, Table, Text, Tile
from topwork.data.manifest import Manifest
from topwork.report.pictures import EXAMPLE, Album
from topwork.report.run_data import Record
from topwork.text import count, escape

MAX_ROWS = 1000  # of any table
N_OPEN = 12  # groups of examples that are open at first
MAX_EXAMPLE_CLASSES = 200
MAX_REJECT_CHARACTERS = 500_000
PART_NAMES = ("train", "valid", "test")


def data(record: Record, album: Album) -> list[Block]:
    """Facts, notes, classes, examples, rejected files."""
    blocks: list[Block] = [Facts(tuple(_facts(record)))]
    if record.manifest.notes:
        blocks.append(Notes(tuple(escape(note) for note in record.manifest.notes)))
    rows = {name: by.get("train") or next(iter(by.values()), []) for name, by in record.rows_by_class.items()}
    shown = Fold("Examples of each class", examples(record.manifest, rows, album))
    return [*blocks, _classes(record), shown, *rejected(record.manifest)]


def _facts(record: Record) -> list[tuple[str, str, str]]:
    """Label, value and note of each tile."""
    manifest = record.manifest
    samples = manifest.samples
    widths, heights = np.array([s.width for s in samples]), np.array([s.height for s in samples])
    formats = Counter(sample.format for sample in samples).most_common(3)
    n_gray = sum(sample.mode in ("1", "L", "LA", "I;16") for sample in samples)
    given = "split given by the data" if record.split.get("given") else f"random split, seed {record.split.get('seed')}"
    if record.is_evaluation:
        given = f"{int((record.part_of != '').sum()):,} evaluated"
    low, high = min(manifest.counts.values()), max(manifest.counts.values())
    sizes = f"{low:,} images each" if low == high else f"{low:,} to {high:,} images each"
    return [
        ("Images", f"{len(samples):,}", given),
        ("Rejected files", f"{len(manifest.rejects):,}", ""),
        ("Labels" if manifest.multi_label else "Classes", f"{len(manifest.classes):,}", sizes),
        ("Median size", f"{int(np.median(widths)):,} × {int(np.median(heights)):,}", "pixels"),
        ("Formats", ", ".join(f"{name} {n:,}" for name, n in formats), f"{n_gray:,} grayscale" if n_gray else ""),
    ]


def _classes(record: Record) -> Table:
    parts = [name for name in PART_NAMES if any(name in found for found in record.rows_by_class.values())]
    counts = {name: [len(found.get(part, ())) for part in parts] for name, found in record.rows_by_class.items()}
    largest = max(1, *(sum(n) for n in counts.values()))
    rows: tuple[tuple[AnyCell, ...], ...] = tuple(
        (
            escape(name),
            Stack(tuple((part, k / largest) for part, k in zip(parts, n, strict=True) if k)),
            *n,
            *([sum(n)] if len(parts) > 1 else []),
        )
        for name, n in list(counts.items())[:MAX_ROWS]
    )
    n_all = len(counts)
    note = f"The first {MAX_ROWS:,} of {n_all:,} classes; all are in manifest.parquet." if n_all > MAX_ROWS else ""
    columns = ("Class", "", *parts, *(["total"] if len(parts) > 1 else []))
    return Table("Images per class", columns, rows, note, is_sortable=True, legend=tuple(parts))


def examples(manifest: Manifest, rows: Mapping[str, Sequence[int]], album: Album) -> list[Block]:
    """Some images of each class; always the same ones."""
    n_classes = len(manifest.classes)
    n_each = 6 if n_classes <= 12 else 4 if n_classes <= 40 else 2 if n_classes <= 100 else 1
    cards, counts = [], manifest.counts
    for name, own in list(rows.items())[:MAX_EXAMPLE_CLASSES]:
        chosen = sorted(own, key=lambda row: manifest.samples[row].content_hash)[:n_each]
        tiles = tuple(Tile(album.want(row, EXAMPLE), f"image of {escape(name)}") for row in chosen)
        if tiles:
            cards.append(Card(tiles, title=f"{escape(name)} ({counts[name]:,})"))
    blocks: list[Block] = [Gallery(tuple(cards), "l" if n_each > 2 else "s", n_open=N_OPEN, noun="class")]
    if n_classes > MAX_EXAMPLE_CLASSES:
        blocks.append(Text(f"Examples of the first {MAX_EXAMPLE_CLASSES:,} of {n_classes:,} classes.", "small"))
    return blocks


def rejected(manifest: Manifest) -> list[Block]:
    """Rejected files with the reason; nothing if there are none."""
    rejects = manifest.rejects
    if not rejects:
        return []
    rows, n_characters = [], 0
    for reject in rejects[:MAX_ROWS]:
        rows.append((escape(reject.path), escape(reject.reason)))
        n_characters += len(rows[-1][0])
        if n_characters > MAX_REJECT_CHARACTERS:
            break
    reasons = Counter(escape(reject.reason) for reject in rejects).most_common(5)
    lead = f"{count(len(rejects), 'rejected file')}: " + "; ".join(f"{n:,} × {reason}" for reason, n in reasons)
    note = f"The first {len(rows):,} of {len(rejects):,}; all are in manifest.parquet." if len(rejects) > len(rows) else ""  # fmt: skip
    table = Table(lead, ("File", "Reason"), tuple(rows), note, heading=False, text_columns=(1,), name="rejects", has_filter=True)  # fmt: skip
    return [Fold(lead, [table])]
