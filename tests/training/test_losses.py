"""Terms of the loss on an unlabeled domain: the formulas, and that the loop adds and repeats them."""

import numpy as np
import pytest
import torch

from topwork.adaptation import align
from topwork.data.transforms import InputSpec
from topwork.errors import UsageError
from topwork.training.batches import ImageDataset
from topwork.training.distributed import Processes
from topwork.training.loop import TrainerContext, fit
from topwork.training.losses import TargetTerms, class_confusion
from training.drawn import TinyNetwork, drawn_images, recipe_for, streams


def terms(weight=1.0, confusion=1.0):
    """Images of another seed, of which it is believed that they are what they are with 90 %."""
    pixels, labels = drawn_images(20, seed=9)
    beliefs = np.where(np.eye(2)[labels] > 0, 0.9, 0.1)
    stream = ImageDataset(pixels, beliefs, InputSpec(height=16, width=16), "light", seed=0)
    return TargetTerms(stream, batch_size=6, weight=weight, confusion=confusion)


def test_class_confusion_is_that_of_the_features():
    logits = np.random.default_rng(0).normal(0, 3, (40, 5))
    expected, gradient = align.class_confusion(logits)
    tensor = torch.from_numpy(logits).requires_grad_()
    found = class_confusion(tensor)
    found.backward()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-4, atol=1e-9)


def test_the_loss_of_some_rows():
    some = terms(weight=2.0, confusion=0.5)
    rows = np.array([1, 7, 19])
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    beliefs = torch.from_numpy(some.images.labels[rows])
    fit_to_beliefs = -(beliefs * logits.log_softmax(1)).sum(1).mean()
    expected = 2 * (fit_to_beliefs + 0.5 * class_confusion(logits))
    assert float(some.loss(logits, rows)) == pytest.approx(float(expected), rel=1e-6)


def test_each_step_has_rows_of_its_own_and_always_the_same():
    some = terms()
    assert np.array_equal(some.rows(0, 1, 2), some.rows(0, 1, 2))
    assert len({tuple(sorted(some.rows(0, epoch, step))) for epoch in range(3) for step in range(4)}) > 6
    assert len(set(some.rows(0, 0, 0))) == 6


def test_the_network_comes_to_believe_what_the_target_says():
    """Beliefs that are all one class, at a large weight: the answers on the target become that class."""
    recipe = recipe_for(epochs=6, strategy="all")
    some = terms(weight=5.0, confusion=0.0)
    some.images.labels = np.tile([0.0, 1.0], (20, 1))
    shares = []
    for target in (None, some):
        network = TinyNetwork()
        done = fit(network, recipe, *streams(recipe=recipe), target=target)
        network = TinyNetwork()
        network.load_state_dict(done.last)
        images = torch.from_numpy(some.images.load(np.arange(20), None))
        with torch.no_grad():
            shares.append(float((some.images.wrap(network.eval())(images).argmax(1) == 1).float().mean()))
    assert shares[1] > shares[0] + 0.2
    assert all("target_loss" in record for record in done.history)


def test_a_resumed_run_sees_the_same_images_of_the_target(tmp_path):
    recipe = recipe_for(augment="light")
    whole = fit(TinyNetwork(), recipe, *streams(recipe=recipe), target=terms())
    calls = iter(range(8))
    context = TrainerContext(folder=tmp_path, stop=lambda: next(calls, None) is None)
    assert fit(TinyNetwork(), recipe, *streams(recipe=recipe), context, terms()).ending == "interrupted"
    context = TrainerContext(folder=tmp_path, resume=True)
    resumed = fit(TinyNetwork(seed=5), recipe, *streams(recipe=recipe), context, terms())
    assert all(torch.equal(value, resumed.last[name]) for name, value in whole.last.items())
    assert [r["target_loss"] for r in whole.history] == [r["target_loss"] for r in resumed.history]
    without = fit(TinyNetwork(), recipe, *streams(recipe=recipe))
    assert any(not torch.equal(value, without.last[name]) for name, value in whole.last.items())


def test_several_processes_are_refused_by_name():
    recipe = recipe_for(epochs=1)
    with pytest.raises(UsageError, match="single process"):
        fit(TinyNetwork(), recipe, *streams(recipe=recipe), TrainerContext(processes=Processes(n=2)), terms())
