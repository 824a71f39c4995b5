"""``topwork models``: the tutorials' networks have their known counts; nothing is downloaded to count them."""

from __future__ import annotations

import json

import pytest

from terminal import topwork
from topwork.commands import models
from topwork.commands.models import check_backbones, describe, listed
from topwork.errors import UsageError
from topwork.models.sources import EMBEDDED
from topwork.settings import ModelSettings


@pytest.mark.parametrize(
    ("name", "settings", "n_parameters", "n_trainable"),
    [
        ("vgg16", {"hidden": "128:0.2", "outputs": "binary", "drop_hidden": True}, 14_780_481, 65_793),
        ("vgg16.tv_in1k", {"hidden": "256:0.4", "n_classes": 100}, 135_335_076, 1_074_532),
        ("six-blocks", {"outputs": "binary", "strategy": "scratch"}, 9_742_209, 9_742_209),
        ("resnet101", {}, 44_549_160, 2_049_000),
        ("resnet152", {}, 60_192_808, 2_049_000),
        ("resnet18", {"n_classes": 7}, 11_176_512 + 7 * 513, 7 * 513),
        ("resnet34", {"n_classes": 7}, 21_284_672 + 7 * 513, 7 * 513),
        ("resnet50", {"n_classes": 7}, 23_508_032 + 7 * 2049, 7 * 2049),
        ("resnet50", {"n_classes": 7, "strategy": "all"}, 23_508_032 + 7 * 2049, 23_508_032 + 7 * 2049),
    ],
)
def test_known_counts(name, settings, n_parameters, n_trainable):
    found = describe(name, ModelSettings(**settings))
    assert (found.n_parameters, found.n_trainable) == (n_parameters, n_trainable)
    assert found.as_dict()["stages"][0]["n_parameters"] > 0


def test_rates_are_spread_over_the_stages_that_move():
    settings = ModelSettings(n_classes=2, strategy="last", last_stages=2, lr="1e-6:1e-4")
    rows = {row.stage: row for row in describe("resnet18", settings).stages}
    assert [name for name, row in rows.items() if row.trainable] == ["layer3", "layer4", "classifier"]
    assert rows["layer2"].rate == 0
    assert rows["layer3"].rate < rows["layer4"].rate < rows["classifier"].rate == pytest.approx(1e-4)


def test_preprocessing_is_that_of_the_weights():
    assert describe("lite1").preprocessing["height"] == 240
    assert describe("lite0").preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert describe("resnet18.tv_in1k").preprocessing["mean"] != [0.5, 0.5, 0.5]


def test_a_network_without_a_classifier_is_counted_with_one():
    found = describe("facebook/dinov2-small", ModelSettings(strategy="head"))
    assert (found.n_features, found.n_trainable) == (384, 2 * 385)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("resnet1800", {}, "not a name that timm knows"),
        ("resnet18", {"drop_hidden": True}, "no hidden layers"),
        ("resnet18", {"n_classes": 3, "outputs": "binary"}, "two classes"),
        ("six-blocks", {"hidden": "12"}, "only takes"),
    ],
)
def test_wrong_use_is_named(name, settings, words):
    with pytest.raises(UsageError, match=words):
        describe(name, ModelSettings(**settings))


def test_check_tells_what_can_be_done_with_each_name():
    done = topwork("models", "--check", "random:test_vit", "random:test_efficientnet", "resnet81", "--json")
    assert done.returncode == 1  # the last is no name
    vit, cnn, unknown = json.loads(done.stdout)["backbones"]
    assert (vit["engine"][:8], vit["n_features"], vit["is_timm"], vit["problem"]) == ("openvino", 64, True, None)
    assert {"avg", "token", "both"} <= set(vit["poolings"])
    assert "token" not in cnn["poolings"]
    assert cnn["stages"][0] == "blocks.0"
    assert cnn["images_per_second"] > 0
    assert "Did you mean" in unknown["problem"]


def test_the_list_tells_sizes_and_published_accuracy():
    own = {row["name"]: row for row in listed("")["backbones"]}
    assert set(own) == set(EMBEDDED)
    for name, row in own.items():
        assert row["n_parameters"] == sum(stage.n_parameters for stage in describe(name).stages)
        assert (row["size"], row["license"]) == (EMBEDDED[name].side, "apache-2.0")
        assert 70 < row["top1"] < 80
    found = {row["name"]: row for row in listed("resnet18.*")["backbones"]}
    assert found["resnet18.a3_in1k"]["size"] == 160
    assert found["resnet18.fb_ssl_yfcc100m_ft_in1k"] == {
        "name": "resnet18.fb_ssl_yfcc100m_ft_in1k", "size": 224, "n_parameters": 11_689_512, "top1": None,
        "license": "cc-by-nc-4.0",
    }  # fmt: skip
    assert all(row["n_parameters"] is None for row in listed("vit*")["backbones"])  # too many to build


def test_any_error_of_one_network_leaves_the_others(monkeypatch):
    load = models.load_backbone

    def failing(name, **options):
        return {}["no such key"] if name == "random:test_vit2" else load(name, **options)

    monkeypatch.setattr(models, "load_backbone", failing)
    broken, whole = check_backbones(["random:test_vit2", "random:test_vit"])
    assert broken.problem == "KeyError: 'no such key'"
    assert whole.problem is None
