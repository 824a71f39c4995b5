"""Data: used and rejected images, images per class and part, and examples. Label errors: labels that are likely wrong.

Label errors come with similar images as evidence, outliers, and repeated or leaked images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from topwork.blocks import (
    AnyCell,
    Block,
    Card,
    Command,
    Facts,
    Fold,
    Gallery,
    Line,
    Notes,
    Stack,
    Table,
    Text,
    Tile,
    as_share,
)
from topwork.data.manifest import Manifest
from topwork.evaluation.metrics import leak_sentence
from topwork.report.pictures import EXAMPLE, Album
from topwork.report.run_data import Record
from topwork.settings import quote
from topwork.text import count, escape, percent

MAX_ROWS = 1000  # of any table
N_OPEN = 12  # groups of examples that are open at first
MAX_EXAMPLE_CLASSES = 200
MAX_REJECT_CHARACTERS = 500_000
PART_NAMES = ("train", "valid", "test")
MAX_SUSPECTS, N_SUSPECTS_OPEN, N_NEIGHBORS, MAX_OUTLIERS = 40, 4, 3, 12


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


# ---- label errors
def label_errors(record: Record, album: Album) -> list[Block]:
    """Likely label errors, outliers, repeated images; nothing if labels were not checked."""
    insights = record.insights
    if not insights.get("n_audited"):
        return []
    suspects = [suspect for suspect in insights.get("suspects", []) if suspect["is_confident"]]
    n, n_audited = insights["n_suspects"], insights["n_audited"]
    blocks: list[Block]
    if suspects:
        lead = f"{n:,} of {count(n_audited, 'label')} ({percent(n / n_audited)}) {'is' if n == 1 else 'are'} likely wrong: models not trained on the image confidently predict another class. Some of these images are just hard."  # fmt: skip
        cards = tuple(_suspect(record, suspect, album) for suspect in suspects[:MAX_SUSPECTS])
        blocks = [
            Text(lead, "lead"),
            Text("Review them in the browser, then retrain:"),
            Command(f"topwork review {quote(str(record.folder))}", "Command that reviews label errors"),
            Gallery(cards, "l", n_open=N_SUSPECTS_OPEN, noun="likely label error"),
        ]
    else:
        blocks = [Text(f"None of {count(n_audited, 'label')} is likely wrong.", "lead")]
    blocks += [Text(text) for text in repeats(insights.get("duplicates") or {}, record.evaluation)]
    outliers = insights.get("outliers", [])[:MAX_OUTLIERS]
    if outliers:
        cards = tuple(_outlier(record, item, album) for item in outliers)
        note = Text("Images that are least similar to all others: bad scans, other subjects or rare cases.", "small")
        blocks.append(Fold("Outliers", [note, Gallery(cards, "s")]))
    return blocks


def _suspect(record: Record, suspect: dict[str, Any], album: Album) -> Card:
    samples, row = record.manifest.samples, suspect["row"]
    label, suggested = escape(samples[row].label), escape(suspect["suggested"])
    lines = (
        Line("label", label, percent(suspect["label_probability"])),
        Line("predicted", suggested, percent(suspect["suggested_probability"]), "bad"),
    )
    near = tuple(
        Tile(album.want(other, EXAMPLE), f"similar image of {escape(samples[other].label)}", escape(samples[other].label))
        for other in suspect["neighbors"][:N_NEIGHBORS]
    )  # fmt: skip
    part = str(record.part_of[row])
    path = escape(samples[row].path) + (f" · {part}" if part else "")
    return Card(
        (Tile(album.want(row, EXAMPLE), f"image labeled {label}"),), lines, path, near, "Most similar", title=""
    )


def _outlier(record: Record, item: dict[str, Any], album: Album) -> Card:
    sample = record.manifest.samples[item["row"]]
    label = escape(sample.label)
    return Card((Tile(album.want(item["row"], EXAMPLE), f"image of {label}"),), (Line("", label),), escape(sample.path))


def repeats(duplicates: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """Leaked and repeated images, with the accuracy without them."""
    said = []
    said += [leak_sentence(part, evaluation) for part in evaluation.get("leaks", {})]
    for part, found in duplicates.items():
        n = found["n_repeated"]
        said.append(
            f"{count(n, 'image')} of {part} {'repeats' if n == 1 else 'repeat'} another image of {part}. Accuracy with one of each: "
            f"{as_share(found['accuracy_without'])}, on {count(found['n_without'], 'image')}."
        )
    return said
