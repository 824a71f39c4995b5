"""The model folder: comes back as it was, is a timm model when plain, and is refused when anything in it changed."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from drawing import draw_folders
from topwork.commands.fit import fit
from topwork.errors import ModelError, TopworkError, UsageError
from topwork.export.predictor import Predictor
from topwork.files import file_digest
from topwork.models.classifier import FIELDS, FORMAT, check_description, facts_digest, load_classifier
from topwork.settings import FitSettings


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifier")
    data = draw_folders(root / "data", n_each=15)
    made = {}
    for head in ("plain", "extended"):
        settings = FitSettings(backbone="random:test_efficientnet", head=head, near_duplicates=False)
        made[head] = fit(data, root / head, settings)
    return made


@pytest.fixture
def folder(runs, tmp_path):
    shutil.copytree(runs["plain"].folder / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("head", ["plain", "extended"])
def test_it_comes_back_as_it_was(runs, head):
    made = runs[head].classifier
    read = load_classifier(runs[head].folder)
    assert (read.classes, read.head.kind, read.thresholds) == (made.classes, head, made.thresholds)
    np.testing.assert_array_equal(read.head.weight, made.head.weight)
    np.testing.assert_array_equal(read.arrays["unknown_centres"], made.arrays["unknown_centres"])
    assert read.backbone.spec == made.backbone.spec


def test_a_plain_model_is_a_timm_model(runs, tmp_path):
    """timm alone, on the same pixels: the same probabilities, calibration included."""
    import timm

    from topwork.data.images import decode
    from topwork.data.transforms import fit_to_input

    run = runs["plain"]
    network = timm.create_model(f"local-dir:{run.folder / 'model'}", pretrained=True).eval()
    spec = run.classifier.backbone.spec
    pixels = np.stack([fit_to_input(decode(run.manifest.read(row)).pixels, spec) for row in range(8)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    with torch.inference_mode():
        theirs = network((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).softmax(1).numpy()
    ours, _ = Predictor(run.classifier).answer(pixels)
    np.testing.assert_allclose(ours, theirs, atol=2e-2)
    assert json.loads((run.folder / "model" / "config.json").read_text())["label_names"] == list(run.classifier.classes)


def test_an_extended_model_carries_nothing_that_could_answer_differently(runs):
    assert not (runs["extended"].folder / "model" / "config.json").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "openvino.bin", "openvino.xml", "config.json", "decision.safetensors"]
)
def test_any_changed_byte_is_noticed(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_classifier(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "openvino.bin", "decision.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_classifier(folder)


def changed(folder, **values):
    """Alters the description as somebody would who knows how it is signed."""
    facts = json.loads((folder / "topwork.json").read_text()) | values
    (folder / "topwork.json").write_text(json.dumps(facts | {"digest": facts_digest(facts)}))


def test_an_altered_description_is_noticed(folder):
    """Thresholds and class names are as good as weights for making a model answer wrongly."""
    text = (folder / "topwork.json").read_text()
    (folder / "topwork.json").write_text(text.replace('"disc"', '"dusk"'))
    with pytest.raises(ModelError, match=r"topwork\.json: damaged or modified"):
        load_classifier(folder)


def test_a_model_from_the_future_is_refused_by_name(folder):
    changed(folder, format=FORMAT + 1)
    with pytest.raises(ModelError, match="newer version of topwork"):
        load_classifier(folder)


def test_names_never_lead_outside(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    changed(folder, files={"../secret": "0" * 64})
    with pytest.raises(ModelError, match="does not write"):
        load_classifier(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 1}', '{"format": "x"}', "[" * 100_000])
def test_a_broken_description_is_a_named_error(folder, text):
    (folder / "topwork.json").write_text(text)
    with pytest.raises(ModelError, match=r"topwork\.json"):
        load_classifier(folder)


def test_a_pickle_in_place_of_weights_is_not_run(folder, tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    import hashlib

    payload = pickle.dumps(Canary())
    (folder / "model.safetensors").write_bytes(payload)
    facts = json.loads((folder / "topwork.json").read_text())
    changed(folder, files=facts["files"] | {"model.safetensors": hashlib.sha256(payload).hexdigest()})
    with pytest.raises(ModelError):
        load_classifier(folder)
    assert not (tmp_path / "ran").exists()


def test_values_of_the_wrong_kind_are_named_errors(folder):
    """Every entry of the description replaced by something else: refused, or no difference, never another error."""
    original = (folder / "topwork.json").read_text()
    for key in json.loads(original):
        for value in (None, [], {}, "x", -1, 1e400):
            if key != "digest":
                changed(folder, **{key: value})
            with contextlib.suppress(TopworkError):
                load_classifier(folder)
            (folder / "topwork.json").write_text(original)
    (folder / "topwork.json").write_text(original)
    load_classifier(folder)


def test_no_model_is_wrong_use(tmp_path):
    with pytest.raises(UsageError, match="no model here"):
        load_classifier(tmp_path)


# ---- the fields of topwork.json: absurd values with a valid digest are refused by name

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
        check_description(facts, Path("topwork.json"))
    put(facts, field, value)
    with pytest.raises(ModelError, match=rf"{field.replace('.', '[.]').split('[')[0]}") as caught:
        check_description(facts, Path("topwork.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [name for name, rule in FIELDS.items() if not rule.is_optional])
def test_a_missing_field_is_named(field):
    with pytest.raises(ModelError, match=f"{field} is missing"):
        check_description({k: v for k, v in FACTS.items() if k != field}, Path("topwork.json"))


def test_a_format_from_the_future_is_refused_as_such():
    with pytest.raises(ModelError, match="newer version of topwork"):
        check_description(FACTS | {"format": FORMAT + 1}, Path("topwork.json"))


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
