"""The model card: what a model folder says about itself to a person."""

from __future__ import annotations

from typing import Any

from topwork.models.classifier import Classifier
from topwork.text import escape


def model_card(classifier: Classifier) -> str:
    """Markdown with the metadata that model hubs read: data, figures, limits, license of the weights."""
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
        "It knows only these classes"
        + (" and may give an image any number of them" if classifier.multi_label else " and always names one of them")
        + ". The figures hold for images like those it was "
        "trained on; other cameras, places or times can be much harder.",
        "",
    ]
    return "\n".join(lines)


def _figures(provenance: dict[str, Any]) -> str:
    figures = provenance.get("figures")
    if not figures:
        return "Not judged: there was no held-out part."
    accuracy = figures["accuracy"]
    return (
        f"{'All labels right' if 'micro_f1' in figures else 'Accuracy'} on {figures['n']} {provenance['judged_on']} images: {100 * accuracy['value']:.1f} % "
        f"(95 % interval {100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})."
        + (f" Micro F1 {figures['micro_f1']:.3f}." if "micro_f1" in figures else "")
    )


def _plain(name: str) -> str:
    """A class name as text: Markdown and HTML in it have no effect."""
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+-.!|&" else c for c in escape(name))
