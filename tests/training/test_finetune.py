"""From backbone and images to a state dict that timm loads; and what signals do."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

import topwork
from drawing import draw_folders
from topwork.data.manifest import scan
from topwork.errors import TopworkError, UsageError
from topwork.models.backbone import load_backbone
from topwork.models.head import FeatureTransform, LinearHead, parse_head
from topwork.models.modules import count_parameters
from topwork.training.batches import ImageDataset, to_device
from topwork.training.checkpoint import load_checkpoint
from topwork.training.finetune import data_facts, image_datasets, make_network, tune
from topwork.training.loop import Interruption, TrainerContext, fit
from topwork.training.recipe import TuneSettings, plan
from training.drawn import TinyNetwork, drawn_images, recipe_for, streams, tuned_logits

SIDE = 64


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone("random:tf_efficientnet_lite0", cache=tmp_path_factory.mktemp("cache")).with_spec(
        height=SIDE, width=SIDE
    )


def data(spec, n=24, seed=0):
    pixels, labels = drawn_images(n, seed=seed, side=SIDE)
    return ImageDataset(pixels, labels, spec)


def recipe_of(backbone, **settings):
    facts = data_facts(np.arange(24) % 2, 2, 8)
    settings = {"epochs": 1, "batch_size": 8, "augment": "none", "precision": "f32"} | settings
    return plan(TuneSettings(**settings), facts, [stage.name for stage in backbone.stages])


@pytest.mark.parametrize("settings", [{}, {"strategy": "last", "last_stages": 1}])
def test_the_result_is_a_timm_network(backbone, settings):
    recipe = recipe_of(backbone, **settings)
    train, valid = data(backbone.spec), data(backbone.spec, 8, 1)
    done = tune(backbone, recipe, train, valid)
    network = timm.create_model(backbone.architecture, pretrained=False, num_classes=2)
    network.load_state_dict(done.state)  # strict
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in done.state.values())
    images = torch.from_numpy(valid.pixels).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (backbone.spec.mean, backbone.spec.std))
    with torch.inference_mode():
        expected = network.eval()((images - mean) / std).numpy()
    found = tuned_logits(make_network(backbone, done.head, recipe), done.state, recipe, valid)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert done.n_parameters == count_parameters(network)[0]
    n_moving = sum(row.n_parameters for row in done.stages if row.trainable)
    assert done.n_trainable == n_moving
    assert (n_moving < done.n_parameters) == bool(settings)


def test_training_starts_from_the_probes_answers(backbone):
    rng = np.random.default_rng(0)
    transform = FeatureTransform(
        ("last",), "none", rng.normal(size=1280).astype(np.float32), rng.uniform(0.5, 2, 1280).astype(np.float32)
    )
    probe = LinearHead(transform, rng.normal(size=(2, 1280)).astype(np.float32) / 30, np.zeros(2, np.float32))
    recipe = recipe_of(backbone)
    network = make_network(backbone, parse_head("linear"), recipe, probe)
    images = torch.randn(4, 3, SIDE, SIDE)
    with torch.inference_mode():
        features = backbone.module()(images).numpy()
        np.testing.assert_allclose(network(images).numpy(), probe.logits({"last": features}), rtol=1e-3, atol=1e-3)


def test_scratch_forgets_pretrained_weights(backbone):
    recipe = recipe_of(backbone, strategy="scratch")
    network = make_network(backbone, parse_head("16:relu:0.1"), recipe)
    assert [type(part).__name__ for part in network.classifier] == ["Linear", "ReLU", "Dropout", "Linear"]


def test_a_new_head_depends_on_the_seed_only(backbone):
    made = []
    for n_drawn, seed in ((0, 0), (7, 0), (7, 1)):
        torch.randn(n_drawn)
        recipe = replace(recipe_of(backbone), seed=seed)
        made.append(make_network(backbone, parse_head("16"), recipe).classifier[0].weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


def test_images_of_a_manifest_become_streams(tmp_path, backbone):
    manifest = scan(draw_folders(tmp_path, n_each=6))
    recipe = recipe_of(backbone, augment="light")
    rows = np.arange(len(manifest.samples))
    done = []
    train, valid = image_datasets(
        manifest, rows[:6], rows[6:10], backbone, recipe, on_progress=lambda n, total: done.append((n, total))
    )
    assert train.pixels.shape == (6, 74, 74, 3)
    assert valid.pixels.shape == (4, SIDE, SIDE, 3)
    assert list(train.labels) == manifest.labels[:6]
    assert done[-1] == (10, 10)
    assert to_device(train.load(np.arange(2), 0), "cpu").shape == (2, SIDE, SIDE, 3)


def test_a_signal_saves_and_ends_and_the_second_is_not_held_back(tmp_path):
    recipe = recipe_for(epochs=50)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another test may have run the command line in this process
    before = {kind: signal.getsignal(kind) for kind in Interruption.kinds}  # a shell may have SIGINT ignored
    with Interruption() as interruption:

        def on_epoch(record):
            if record["epoch"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        context = TrainerContext(folder=tmp_path, stop=interruption.stopped, on_epoch=on_epoch)
        tuned = fit(TinyNetwork(), recipe, *streams(recipe=recipe), context)
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM] == signal.SIG_DFL
    assert interruption.signal == signal.SIGTERM
    assert tuned.ending == "interrupted"
    assert len(tuned.history) == 2
    assert load_checkpoint(tmp_path).values["epoch"] == 2
    assert {kind: signal.getsignal(kind) for kind in Interruption.kinds} == before


def test_fine_tune_in_python_with_a_head_of_ones_own(tmp_path):
    manifest = topwork.scan(draw_folders(tmp_path, n_each=6))
    backbone = load_backbone("random:test_resnet").with_spec(height=32, width=32)
    rows = np.concatenate([np.arange(6), len(manifest.samples) - 1 - np.arange(6)])
    parts = replace(topwork.split(manifest), train=rows[::2], valid=rows[1::2])
    mine = torch.nn.Sequential(torch.nn.LayerNorm(backbone.n_features), torch.nn.Linear(backbone.n_features, 2))
    settings = TuneSettings(epochs=1, batch_size=4, precision="f32")
    done = topwork.fine_tune(backbone, manifest, parts, settings, head=mine)
    assert done.recipe.phases[0].name == "head"  # a new head is trained alone first
    assert done.network()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises(UsageError, match="Custom heads"):
        done.backbone_and_head()
    tuned, head = topwork.fine_tune(backbone, manifest, parts, settings, head="4:0.1").backbone_and_head()
    assert head.weight.shape == (2, 4)
    assert tuned.n_features == 4


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_that_only_emulates_bf16_is_not_given_it(has_bf16, monkeypatch):
    """torch says yes for a T4 too, unless it is asked not to count emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    assert data_facts(np.arange(24) % 2, 2, 8, device="cuda").has_bf16 is has_bf16


def test_an_image_that_vanished_or_changed_since_the_scan_is_named(tmp_path, backbone):
    folder = draw_folders(tmp_path / "data", n_each=3, shapes=("disc", "cross"))
    manifest = scan(folder)
    rows, recipe = np.arange(len(manifest.samples)), recipe_of(backbone)
    first, last = (folder / manifest.samples[row].path for row in (0, -1))
    kept = last.read_bytes()
    last.write_bytes(first.read_bytes())  # a sound image, but another one
    with pytest.raises(TopworkError, match=f"{last.name}: changed since the scan .its content differs"):
        image_datasets(manifest, rows, rows[:0], backbone, recipe)
    last.write_bytes(kept)
    first.unlink()
    with pytest.raises(TopworkError, match=f"{first.name}: changed since the scan"):
        image_datasets(manifest, rows, rows[:0], backbone, recipe)
