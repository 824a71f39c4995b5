"""Label errors: labels that are likely wrong with similar images as evidence, outliers, and repeated or leaked images."""

from __future__ import annotations

from typing import Any

from topwork.blocks import Block, Card, Command, Fold, Gallery, Line, Text, Tile, as_share
from topwork.evaluation.metrics import leak_sentence
from topwork.report.pictures import EXAMPLE, Album
from topwork.report.run_data import Record
from topwork.settings import quote
from topwork.text import count, escape, percent

MAX_SUSPECTS, N_NEIGHBORS, MAX_OUTLIERS = 40, 3, 12
N_OPEN = 4


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
            Gallery(cards, "l", n_open=N_OPEN, noun="likely label error"),
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
