"""Moving the network to a second domain: what it learns from, when it is believed, and batch-norm statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adaptation.test_guards import C, made
from topwork.adaptation.align import answers, fit_head
from topwork.adaptation.batch_norm import with_statistics_of
from topwork.adaptation.guards import choose
from topwork.adaptation.network import SURE, beliefs, believed, moved_choice
from topwork.errors import UsageError
from topwork.models.backbone import load_backbone
from topwork.training.batches import ImageDataset
from training.drawn import drawn_images

SIDE = 64


@pytest.fixture(scope="module")
def situation():
    """A shift that the features can follow only in part: classes overlap."""
    domains, _, truth = made()
    rng = np.random.default_rng(1)
    noisy = domains.moved(
        *((x + rng.normal(0, 1.6, x.shape)).astype(np.float32) for x in (domains.source, domains.target))
    )
    choice = choose(noisy, answers(fit_head(noisy), noisy.target))
    assert choice.outcome == "adapted"
    return noisy, choice, truth


def test_only_what_the_methods_agree_on_is_learned(situation):
    domains, choice, _ = situation
    wanted = beliefs(choice, domains.known)
    votes = choice.consensus[np.arange(len(wanted)), choice.probabilities.argmax(1)]
    assert 0 < (votes < SURE).sum() < len(votes)
    assert np.array_equal(wanted.sum(1) > 0, votes >= SURE)
    assert np.array_equal(wanted.argmax(1)[votes >= SURE], choice.probabilities.argmax(1)[votes >= SURE])


def test_given_labels_are_certain(situation):
    choice = situation[1]
    answer = choice.probabilities.argmax(1)
    known = np.full(len(answer), -1)
    known[:10] = (answer[:10] + 1) % C  # the user says that the methods err
    assert np.array_equal(beliefs(choice, known)[:10], np.eye(C)[known[:10]])


def test_a_network_that_sees_the_classes_better_is_believed(situation):
    domains, choice, truth = situation
    centers = np.random.default_rng(5).normal(0, 3.0, (C, domains.target.shape[1]))
    clear = domains.moved(
        (domains.source + centers[domains.labels]).astype(np.float32),
        (domains.target + centers[truth]).astype(np.float32),
    )
    belief = believed(domains, choice, clear, np.eye(C)[truth])
    assert belief.is_kept
    after = moved_choice(choice, np.eye(C)[truth], belief, "network tuned")
    assert after.method.endswith("network tuned")
    assert "The network was moved, too" in after.reason
    assert np.array_equal(after.probabilities.argmax(1), truth)


def test_worse_answers_and_the_same_answers_are_not(situation):
    domains, choice, _ = situation
    worse = choice.probabilities.copy()
    worse[::3] = np.roll(worse[::3], 1, axis=1)
    assert not believed(domains, choice, domains, worse).is_kept
    assert not believed(domains, choice, domains, choice.probabilities).is_kept


def test_answers_that_only_please_themselves_are_not_believed(situation):
    """Drawn together by answers at random: they agree among their own neighbors; what was there before must not lie above."""
    domains, choice, _ = situation
    rng = np.random.default_rng(3)
    drawn = rng.integers(C, size=len(domains.target))
    blurred = domains.moved(domains.source, rng.normal(0, 1, domains.target.shape).astype(np.float32))
    belief = believed(replace(domains), choice, blurred, np.eye(C)[drawn])
    assert not belief.is_kept


# ---- batch-norm statistics


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_backbone("random:test_efficientnet", cache=cache).with_spec(height=SIDE, width=SIDE)


def test_statistics_are_those_of_both_domains_alike(backbone, monkeypatch, tmp_path):
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    bright, dark = drawn_images(32, side=SIDE)[0] // 2 + 120, drawn_images(32, seed=1, side=SIDE)[0] // 4
    domains = [ImageDataset(pixels, np.zeros(32, np.int64), backbone.spec) for pixels in (bright, dark)]
    moved = with_statistics_of(backbone, domains)
    assert moved.weights_digest != backbone.weights_digest
    before, after = backbone.module(), moved.module()
    first = next(name for name, module in before.named_modules() if isinstance(module, nn.BatchNorm2d))
    # the first norm sees what no other norm has changed: its statistics are known
    seen = []
    hook = before.get_submodule(first).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (backbone.spec.mean, backbone.spec.std))
    with torch.no_grad():
        both = torch.from_numpy(np.concatenate([bright, dark])).permute(0, 3, 1, 2).float()
        before((both - mean) / std)
    hook.remove()
    expected = seen[0].mean((0, 2, 3))
    found = after.get_submodule(first).running_mean
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0.15 * float(expected.abs().mean()))
    unchanged = {k: v for k, v in before.state_dict().items() if "running" not in k and "num_batches" not in k}
    assert all(torch.equal(after.state_dict()[key], value) for key, value in unchanged.items())


def test_a_network_without_batch_norm_is_named():
    backbone = load_backbone("random:test_vit")
    stream = ImageDataset(drawn_images(4, side=160)[0], np.zeros(4, np.int64), backbone.spec)
    with pytest.raises(UsageError, match="no batch norms"):
        with_statistics_of(backbone, [stream])
