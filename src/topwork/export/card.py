"""The model card of a model folder."""

from __future__ import annotations

from typing import Any

from topwork.evaluation.calibration import outcome_sentence, too_few_sentence
from topwork.models.classifier import Classifier
from topwork.text import count, decimal, escape, percent_ci


def model_card(classifier: Classifier) -> str:
    """Markdown with the metadata that model hubs read: data, metrics, limitations, license of the weights."""
    provenance, spec = classifier.provenance, classifier.backbone.spec
    license_name = classifier.backbone.license or "unknown"
    lines = [
        "---",
        f"license: {license_name}",
        "library_name: timm" if classifier.is_timm else "library_name: topwork",
        "pipeline_tag: image-classification",
        "tags: [image-classification, topwork]",
        "---",
        "",
        f"# Image classifier for {len(classifier.classes)} classes",
        "",
        _figures(provenance),
        "",
        f"- Backbone: {classifier.backbone.name} ({classifier.backbone.architecture}), weights under {license_name}.",
        f"- Head: {classifier.head.kind}, {classifier.head.weight.size + classifier.head.bias.size:,} parameters.",
        f"- Input: {spec.width} x {spec.height} pixels, {spec.fit}, {spec.interpolation}.",
        f"- Probabilities: calibrated, temperature {classifier.temperature:.3f} already in the weights.",
        f"- Training data: digest `{str(provenance.get('data_digest', ''))[:16]}`.",
        "",
        "## Classes",
        "",
        *[f"- {_plain(name)}: {n} training images" for name, n in provenance.get("n_train", {}).items()],
        "",
        "## Use",
        "",
        "```",
        "topwork predict THIS_FOLDER photo.jpg",
        "```",
        "",
        "## Limits",
        "",
        _limits(classifier),
        "",
    ]
    return "\n".join(lines)


def _figures(provenance: dict[str, Any]) -> str:
    figures = provenance.get("figures")
    if not figures:
        return "Not evaluated: there was no held-out part."
    title = "Exact match" if "micro_f1" in figures else "Accuracy"
    clean = ", without images that are also in train" if provenance.get("without_leaks") else ""
    said = [
        f"{title} on {count(figures['n'], provenance['judged_on'] + ' image')}{clean}: {percent_ci(figures['accuracy'])}."
    ]
    if "micro_f1" in figures:
        said.append(f"Micro F1 {decimal(figures['micro_f1'])}.")
    return " ".join([*said, outcome_sentence(provenance.get("outcomes"))]).strip()


def _limits(classifier: Classifier) -> str:
    kind = "may give an image any number of them" if classifier.multi_label else "always gives one of them"
    return " ".join(
        filter(
            None,
            [
                f"The model knows only these classes and {kind}.",
                too_few_sentence(classifier.thresholds),
                "The metrics apply to images like those it was trained on; expect lower accuracy with other cameras, places or times.",
            ],
        )
    )


def _plain(name: str) -> str:
    """A class name with Markdown and HTML escaped."""
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+-.!|&" else c for c in escape(name))
