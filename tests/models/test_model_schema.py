"""Every field of topwork.json has a range: absurd values with a valid digest are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from topwork.errors import ModelError
from topwork.export.predictor import Predictor
from topwork.files import file_digest
from topwork.models.classifier import FORMAT, facts_digest, load_classifier
from topwork.models.model_schema import FIELDS, check_description

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1" / "model"
FACTS = json.loads((GOLDEN / "topwork.json").read_text())


def signed(folder, change):
    """The golden folder with changed facts and digests that fit."""
    shutil.copytree(GOLDEN, folder)
    facts = json.loads((folder / "topwork.json").read_text())
    change(facts)
    for name in facts["files"]:
        facts["files"][name] = file_digest(folder / name)
    facts["digest"] = facts_digest(facts)
    (folder / "topwork.json").write_text(json.dumps(facts))
    return folder


ABSURD = [
    *[("format", value) for value in (0, -5, 1.0, "1", True, None)],
    *[(f"preprocessing.{side}", value) for side in ("height", "width")
      for value in (100_000, 0, -1, float("inf"), "224", 160.0, True, None)],
    ("preprocessing.fit", "zzz"),
    ("preprocessing.crop_fraction", 0),
    ("preprocessing.interpolation", "nearest"),
    ("preprocessing.mean", [float("nan"), 0.5, 0.5]),
    ("preprocessing.mean", [0.5, 0.5]),
    ("preprocessing.std", [0, 0.2, 0.2]),
    ("preprocessing.background", [0, 0, 256]),
    ("preprocessing.mirror", "sideways"),
    ("temperature", float("nan")),
    ("temperature", 0),
    ("precision", "f16"),
    ("kind", "other"),
    ("head.power", "cube"),
    ("head.blocks", ["last", "last"]),
    ("head.blocks", []),
    ("thresholds.unknown", "0.5"),
    ("thresholds.confidence", 2),
    ("thresholds.set_probability", float("nan")),
    ("thresholds.labels", [0.5, "a"]),
    *[("thresholds.positive", value) for value in (3, {}, {"class": "none", "threshold": 0.5}, {"class": "disc", "threshold": 2})],
    ("classes", []),
    ("classes", ["disc", "disc", "square"]),
    ("classes", "abc"),
    ("n_features", 0),
    ("n_features", 1e30),
    ("stages", [{"name": "x"}]),
    ("files", {"model.safetensors": "short"}),
    ("provenance", []),
    ("multi_label", "yes"),
    ("licence_of_weights", 3),
    ("architecture", "hf-hub:evil/model"),
    ("architecture", "local-dir:/tmp/evil"),
    *[("layout.options", value) for value in ({"checkpoint_path": "x"}, {"pretrained_cfg": {}}, {"a": "/etc/passwd"}, {"a": {}})],
]  # fmt: skip


def put(facts, field, value):
    *way, last = field.split(".")
    for key in way:
        facts = facts[key]
    facts[last] = value


@pytest.mark.parametrize(("field", "value"), ABSURD)
def test_an_absurd_value_is_refused_by_name(field, value):
    facts = json.loads(json.dumps(FACTS))
    if field.startswith("layout"):
        facts["layout"] = {"head": "fc", "layers": ["fc"], "is_convolution": False, "takes_size": False, "options": {}}
        check_description(facts, Path("topwork.json"), FORMAT)
    put(facts, field, value)
    with pytest.raises(ModelError, match=rf"{field.replace('.', '[.]').split('[')[0]}") as caught:
        check_description(facts, Path("topwork.json"), FORMAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["format", *FIELDS])
def test_a_missing_field_is_named(field):
    with pytest.raises(ModelError, match=f"{field} is missing"):
        check_description({k: v for k, v in FACTS.items() if k != field}, Path("topwork.json"), FORMAT)


def test_a_format_from_the_future_is_refused_as_such():
    with pytest.raises(ModelError, match="newer version of topwork"):
        check_description(FACTS | {"format": FORMAT + 1}, Path("topwork.json"), FORMAT)


@pytest.mark.parametrize("size", [(161, 160), (224, 224)])
def test_a_size_that_the_compiled_form_does_not_have_is_refused(tmp_path, size):
    def change(facts):
        facts["preprocessing"] |= {"height": size[0], "width": size[1]}
        facts["files"].pop("config.json")

    with pytest.raises(ModelError, match="its input size differs"):
        Predictor(signed(tmp_path / "model", change))


@pytest.mark.parametrize("change", [{"mean": [0, 0, 0]}, {"height": 192, "width": 192}])
def test_what_timm_would_read_must_say_the_same(tmp_path, change):
    with pytest.raises(ModelError, match=r"config\.json: its preprocessing differs"):
        load_classifier(signed(tmp_path / "model", lambda facts: facts["preprocessing"].update(change)))


@pytest.mark.parametrize("name", ["openvino.bin", "openvino.xml", "model.safetensors"])
def test_an_altered_network_is_refused(tmp_path, name):
    shutil.copytree(GOLDEN, tmp_path / "model")
    path = tmp_path / "model" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"{name}: damaged or modified"):
        Predictor(tmp_path / "model")
