"""LoRA trains adapters and head only, resumes, and leaves a network as timm knows it with the same answers."""

import numpy as np
import pytest
import timm
import torch

from topwork.models.backbone import load_backbone
from topwork.models.head import HeadSpec
from topwork.training.batches import ImageDataset
from topwork.training.finetune import make_network, tune
from topwork.training.loop import TrainableNetwork, TrainerContext, predict
from topwork.training.optimizer import freeze, stages_of
from topwork.training.recipe import DataFacts, TuneSettings, plan
from training.drawn import drawn_images, tuned_logits

pytest.importorskip("peft")
RANK = 2


@pytest.fixture(
    scope="module", params=["test_vit", "test_efficientnet", pytest.param("test_convnext", marks=pytest.mark.slow)]
)
def backbone(request, tmp_path_factory):
    return load_backbone(f"random:{request.param}", cache=tmp_path_factory.mktemp("cache"))


def recipe_for(backbone, **settings):
    settings = {"strategy": "lora", "lora_rank": RANK, "epochs": 2, "batch_size": 4, "lr": "1e-2", "augment": "none",
                "precision": "f32", "interpolate": False} | settings  # fmt: skip
    return plan(TuneSettings(**settings), DataFacts((6, 6), 6), [s.name for s in stages_of(backbone.skeleton(2))])


def images(backbone, n, seed=0):
    return ImageDataset(*drawn_images(n, seed, side=backbone.spec.height), backbone.spec)


def test_adapters_change_nothing_at_first_and_merge_into_the_same_answers(backbone):
    recipe, data = recipe_for(backbone), images(backbone, 4)
    network = make_network(backbone, HeadSpec(), recipe).eval()
    before = tuned_logits(make_network(backbone, HeadSpec(), recipe), network.state_dict(), recipe, data)
    net = TrainableNetwork(network, recipe, data, "cpu")
    np.testing.assert_allclose(predict(net, data), before, rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in net.core.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    unmerged = predict(net, data)
    change = np.abs(unmerged - before).max()
    assert change > 1e-3 * np.abs(before).max()
    merged = net.original(net.state())
    assert {name: value.shape for name, value in merged.items()} == {
        name: value.shape for name, value in make_network(backbone, HeadSpec(), recipe).state_dict().items()
    }
    again = tuned_logits(make_network(backbone, HeadSpec(), recipe), merged, recipe, data)
    np.testing.assert_allclose(again, unmerged, rtol=1e-4, atol=1e-2 * change)


def test_only_adapters_and_head_are_trained_and_timm_loads_the_result(backbone):
    recipe = recipe_for(backbone)
    done = tune(backbone, recipe, images(backbone, 12), images(backbone, 6, 1))
    network = timm.create_model(backbone.architecture, pretrained=False, num_classes=2)
    network.load_state_dict(done.state)  # strict
    counted = make_network(backbone, HeadSpec(), recipe)
    net = TrainableNetwork(counted, recipe, images(backbone, 4), "cpu")
    freeze(net.core, recipe.phases[-1])
    trained = {name: value for name, value in net.core.named_parameters() if value.requires_grad}
    head = sum(value.numel() for name, value in trained.items() if ".lora_" not in name)
    assert head == sum(stage.n_parameters for stage in stages_of(net.core) if stage.name == "classifier")
    assert sum(value.numel() for value in trained.values()) == done.n_trainable < 0.5 * done.n_parameters
    assert set(net.state()) == set(trained)  # and so are checkpoints and averages


def test_a_run_that_was_stopped_and_resumed_has_the_same_bits(backbone, tmp_path):
    recipe, data = recipe_for(backbone, ema=0.9), (images(backbone, 12), images(backbone, 6, 1))
    torch.manual_seed(0)  # of the new head
    whole = tune(backbone, recipe, *data)
    steps = iter(range(4))
    context = TrainerContext(tmp_path, stop=lambda: next(steps, None) is None)
    torch.manual_seed(0)
    assert tune(backbone, recipe, *data, context=context).result.ending == "interrupted"
    resumed = tune(backbone, recipe, *data, context=TrainerContext(tmp_path, resume=True))
    for name, value in whole.result.last.items():
        assert torch.equal(value, resumed.result.last[name]), name
    assert all(torch.equal(value, resumed.state[name]) for name, value in whole.state.items())
