"""``topwork adapt --mode batch-norm|tune``: after the features the network is moved, and kept only where that is believed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.adapted_head import adapted_classifier, adapted_head, loss_on_source, score
from topwork.adaptation.align import Domains, Shares, distil
from topwork.adaptation.guards import Choice, choose
from topwork.commands.adapt_sides import Source, Target, domains_of, held_out, penalty_of
from topwork.data.manifest import Manifest
from topwork.errors import Interrupted, UsageError
from topwork.evaluation.predictions import softmax
from topwork.features.embed import Embedder, embed
from topwork.features.engine import load_engine
from topwork.models.backbone import Backbone
from topwork.models.classifier import Classifier
from topwork.models.head import LinearHead
from topwork.progress import Reporter
from topwork.settings import AdaptSettings


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Both sides as the network sees them, and what was decided.

    Attributes:
        own, rows: rows of the source and of the target that ``domains`` holds.
        is_moved: whether the network is another than the source's.
        history: one record an epoch, where the network was trained.
    """

    source: Source
    target: Target
    domains: Domains
    own: NDArray[np.int64]
    rows: NDArray[np.int64]
    choice: Choice
    classifier: Classifier
    embedder: Embedder
    is_moved: bool = False
    history: tuple[dict[str, Any], ...] = ()


def moved(found: Adaptation, settings: AdaptSettings, reporter: Reporter) -> Adaptation:
    """The adaptation on a moved network; the one that was found where that is no better, with the reason in its choice.

    Raises:
        Interrupted: a signal came while the network was trained.
    """
    from topwork.adaptation.network import believed, moved_choice

    if found.choice.outcome != "adapted" or found.choice.method == "labels only":
        reporter.note(
            f"--mode {settings.mode}: the network stays as it is, since the features were not adapted either."
        )
        return found
    try:
        other, answers, head = (_trained if settings.mode == "tune" else _re_estimated)(found, settings, reporter)
    except UsageError as error:
        reporter.note(str(error))
        return replace(found, choice=replace(found.choice, reason=f"{found.choice.reason} {error}"))
    belief = believed(found.domains, found.choice, other.domains, answers)
    kept_out = held_out(other.source)
    loss = loss_on_source(found.source.classifier.head, head, held_out(found.source), kept_out)
    if loss is not None or not belief.is_kept:
        against = f"it {loss}" if loss is not None else belief.reason
        reporter.note(f"The network was moved ({settings.mode}) and put back: {against}.")
        words = f"{found.choice.reason} The network was moved and put back: {against}."
        return replace(found, choice=replace(found.choice, reason=words, checks=found.choice.checks | belief.checks))
    choice = moved_choice(found.choice, answers, belief, "network tuned" if other.history else "batch-norm statistics")
    last = (other.source.features.block("last", other.own), other.target.features.block("last", other.rows))
    classifier = adapted_classifier(other.source.classifier, head, other.domains, choice, kept_out, last)
    return replace(other, choice=choice, classifier=classifier)


def _trained(found: Adaptation, settings: AdaptSettings, reporter: Reporter) -> tuple[Adaptation, Shares, LinearHead]:
    """Fine-tuned on the labels of the source and on what is believed of the target."""
    from topwork.adaptation.network import Images, beliefs, move_network
    from topwork.training.loop import Interruption, TrainerContext

    source, target = found.source, found.target
    start = adapted_head(source.classifier.head, found.domains, found.choice, penalty_of(source.run))
    with Interruption() as interruption:
        context = TrainerContext(reporter=reporter, stop=interruption.stopped)
        done = move_network(
            source.classifier.backbone,
            start,
            Images(source.manifest, found.own, found.domains.labels),
            Images(target.manifest, found.rows, beliefs(found.choice, found.domains.known)),
            epochs=settings.epochs, seed=settings.seed, n_threads=settings.workers, context=context,
            on_progress=reporter.progress,
        )  # fmt: skip
    if done.ending == "interrupted" and interruption.signal is not None:
        raise Interrupted(interruption.signal)
    other = _seen_by(found, done.backbone, done.head, settings, reporter)
    return replace(other, history=tuple(done.history)), softmax(score(done.head, other.domains.target)), done.head


def _re_estimated(
    found: Adaptation, settings: AdaptSettings, reporter: Reporter
) -> tuple[Adaptation, Shares, LinearHead]:
    """Batch-norm statistics of both domains, then the methods on features once more.

    Raises:
        UsageError: the network has no batch norm; nothing is believed on the new features.
    """
    from topwork.adaptation.batch_norm import with_statistics_of
    from topwork.training.batches import ImageDataset
    from topwork.training.finetune import decode_rows

    source, spec = found.source, found.source.classifier.backbone.spec
    sides = ((source.manifest, found.own), (found.target.manifest, found.rows))
    streams = []
    for manifest, rows in sides:
        pixels = decode_rows(manifest, rows, spec, n_threads=settings.workers, on_progress=reporter.progress)
        streams.append(ImageDataset(pixels, np.zeros(len(rows), np.int64), spec))
    backbone = with_statistics_of(source.classifier.backbone, streams, settings.seed)
    other = _seen_by(found, backbone, source.classifier.head, settings, reporter)
    domains, eye, penalty = other.domains, np.eye(found.domains.n_classes), penalty_of(source.run)
    # the features moved, so the head is fitted again: on the source alone
    fitted = distil(domains.source, eye[domains.labels], domains.target[:1], eye[:1], penalty, share=0.0)
    choice = choose(domains, softmax(domains.target @ fitted[:-1] + fitted[-1]), seed=settings.seed)
    if choice.outcome != "adapted":
        raise UsageError(f"The network was moved (batch-norm) and put back: {choice.reason}")
    return other, choice.probabilities, adapted_head(source.classifier.head, domains, choice, penalty)


def _seen_by(
    found: Adaptation, backbone: Backbone, head: LinearHead, settings: AdaptSettings, reporter: Reporter
) -> Adaptation:
    """The same images embedded by another network."""
    reporter.step("embed again")
    embedder = Embedder(backbone, load_engine(backbone, precision="f32"))

    def embedded(manifest: Manifest) -> Any:
        return embed(
            backbone, manifest, embedder=embedder, n_threads=settings.workers, on_progress=reporter.progress
        )  # fmt: skip

    classifier = replace(found.source.classifier, backbone=backbone, head=head, precision="f32")
    source = replace(found.source, classifier=classifier, features=embedded(found.source.manifest))
    target = replace(found.target, features=embedded(found.target.manifest))
    return replace(
        found, source=source, target=target, domains=domains_of(source, target, found.own, found.rows),
        classifier=classifier, embedder=embedder, is_moved=True,
    )  # fmt: skip
