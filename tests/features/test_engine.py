"""Every engine gives torch's features; batches, order and process do not show; a bad form is refused."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from topwork.data.transforms import InputSpec
from topwork.errors import UsageError
from topwork.features import engine as engines
from topwork.features.engine import (
    BATCH,
    TorchEngine,
    compiled_form,
    compiled_path,
    feature_network,
    fingerprint,
    load_engine,
)
from topwork.models.backbone import load_backbone


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("random:test_efficientnet")


@pytest.fixture(scope="module")
def images(tiny):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (BATCH + 9, tiny.spec.height, tiny.spec.width, 3), dtype=np.uint8)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_openvino_agrees_with_torch(tiny, images, precision):
    engine = load_engine(tiny, "openvino", precision) if precision == "f32" else load_engine(tiny)
    with torch.inference_mode():
        last, stages = feature_network(tiny)(torch.from_numpy(images))
    found = engine.run(images)
    least = engines.LEAST_COSINE[engine.precision]
    assert cosine(found["last"], last.numpy()) > least
    assert cosine(found["stages"], stages.numpy()) > least


def test_features_are_what_timm_computes_from_normalized_pixels(tiny, images):
    """The graph's own normalization and hooks against timm called by hand."""
    network = tiny.module()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tiny.spec.mean, tiny.spec.std))
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        expected = network(x).numpy()
        maps = network.forward_intermediates(x, intermediates_only=True)
    found = TorchEngine(tiny, "f32").run(images)
    np.testing.assert_allclose(found["last"], expected, atol=2e-3, rtol=2e-3)
    last_map = maps[-1]
    pooled = torch.cat([last_map.mean((2, 3)), last_map.amax((2, 3))], 1).numpy()
    np.testing.assert_allclose(found["stages"][:, -pooled.shape[1] :], pooled, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["openvino", "torch"])
def test_an_image_has_the_same_features_alone_and_in_any_batch(tiny, images, kind):
    engine = load_engine(tiny, kind)
    together = engine.run(images)
    alone = [engine.run(images[n : n + 1]) for n in range(len(images))]
    backwards = engine.run(images[::-1])
    for name in ("last", "stages"):
        if kind == "openvino":
            np.testing.assert_array_equal(together[name], np.concatenate([batch[name] for batch in alone]))
            np.testing.assert_array_equal(together[name], backwards[name][::-1])
        else:
            np.testing.assert_allclose(together[name], backwards[name][::-1], atol=1e-2)


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9])
def test_the_check_compares_features_of_any_size(size):
    a = np.random.default_rng(0).normal(size=(3, 8)) * size
    b = a + 0.1 * size * np.random.default_rng(1).normal(size=(3, 8))
    wanted = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert engines._least_cosine(a, b) == pytest.approx(wanted.min())
    assert engines._least_cosine(0 * a, 0 * a) == 1
    assert engines._least_cosine(0 * a, a) == 0


def test_the_compiled_form_is_kept_and_needs_no_torch(tiny):
    load_engine(tiny, "openvino", "f32")
    program = (
        "import sys\nfrom topwork.models.backbone import load_backbone\nfrom topwork.features.engine import load_engine\n"
        "import numpy as np\nb = load_backbone('random:test_efficientnet')\n"
        "load_engine(b, 'openvino', 'f32').run(np.zeros((1, b.spec.height, b.spec.width, 3), np.uint8))\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_form_that_differs_from_torch_is_refused(tiny, tmp_path, monkeypatch):
    """Planted: the compiled form of other weights, which the check on drawn images must catch."""
    from safetensors.torch import load_file, save_file

    mine, other = (copied(tiny, tmp_path / name) for name in ("mine", "other"))
    weights = load_file(other.folder / "model.safetensors")
    save_file({k: v.flip(0) if v.ndim == 4 else v for k, v in weights.items()}, other.folder / "model.safetensors")
    load_engine(other, "openvino", "f32")
    honest = engines._write_ir

    def planted(model, xml):
        honest(model, xml)
        for suffix in (".xml", ".bin"):
            shutil.copy(compiled_path(other).with_suffix(suffix), xml.with_suffix(suffix))

    monkeypatch.setattr(engines, "_write_ir", planted)
    with pytest.raises(UsageError, match="features differ from torch's"):
        load_engine(mine, "openvino")
    engine = load_engine(mine, "auto")
    assert engine.kind == "torch"
    assert "using torch" in engine.note


def copied(backbone, folder, *, compiled=False):
    shutil.copytree(backbone.folder, folder, ignore=shutil.ignore_patterns(*([] if compiled else ["openvino-*"])))
    return dataclasses.replace(backbone, folder=folder)


@pytest.mark.parametrize("damage", [".json torn", ".bin flipped", ".bin cut", ".xml empty", ".bin missing"])
def test_a_damaged_compiled_form_is_made_again_with_a_note(tiny, images, tmp_path, damage):
    """Flipped bytes in the weights used to be believed: logits were off by 1.9 without a word."""
    first = load_engine(tiny, "openvino", "f32")
    mine = copied(tiny, tmp_path / "mine", compiled=True)
    assert compiled_form(mine) is not None
    suffix, how = damage.split()
    path = compiled_path(mine).with_suffix(suffix)
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2 : len(data) // 2 + 4096] = bytes(b ^ 0x80 for b in data[len(data) // 2 :][:4096])
    elif how in ("cut", "torn"):
        del data[len(data) // 2 :]
    path.write_bytes(b"" if how == "empty" else bytes(data))
    if how == "missing":
        path.unlink()
    assert compiled_form(mine) is None  # nor does it get into a model folder
    if how not in ("torn", "flipped"):
        return
    again = load_engine(mine, "openvino", "f32")
    np.testing.assert_array_equal(again.run(images[:2])["last"], first.run(images[:2])["last"])
    assert "compiled again" in again.note
    assert load_engine(mine, "openvino", "f32").note is None


def test_a_network_that_cannot_be_converted_runs_in_torch_and_says_so(tiny, images, tmp_path, monkeypatch):
    """Conversion raises errors of many kinds; it is not tried again by the next process."""
    mine = copied(tiny, tmp_path / "mine")

    def refuses(_network, _spec):
        raise TypeError("no rule for aten::strange")

    monkeypatch.setattr(engines, "_converted", refuses)
    assert "aten::strange" in load_engine(mine).note
    monkeypatch.undo()
    engine = load_engine(mine)
    assert engine.kind == "torch"
    assert "aten::strange" in engine.note
    np.testing.assert_array_equal(engine.run(images[:3])["last"], TorchEngine(tiny, "f32").run(images[:3])["last"])
    with pytest.raises(UsageError, match="aten::strange"):
        load_engine(mine, "openvino")


def test_the_fingerprint_changes_with_everything_a_feature_depends_on(tiny):
    engine = load_engine(tiny, "openvino", "f32")
    other_precision = TorchEngine(tiny, "f32")
    prints = {
        fingerprint(tiny, engine),
        fingerprint(tiny, other_precision),
        fingerprint(tiny.with_spec(height=96), engine),
        fingerprint(tiny.with_spec(fit="crop"), engine),
        fingerprint(load_backbone("random:test_resnet"), engine),
    }
    assert len(prints) == 5


def test_nothing_is_reported_to_anybody(tiny):
    """OpenVINO's package reports its import to its makers unless kept from it."""
    program = (
        "import sys, topwork.features.engine as e\ne._openvino()\nassert sys.modules.get('openvino_telemetry') is None"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


SIGNALLED = """
import gc, signal
import numpy as np
from topwork.features.engine import load_engine
from topwork.models.backbone import load_backbone

seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append("signal"))
backbone = load_backbone("random:test_efficientnet")
images = np.zeros((1, backbone.spec.height, backbone.spec.width, 3), np.uint8)
first, second = load_engine(backbone, "openvino"), load_engine(backbone, "openvino", "f32")
first.run(images), second.run(images)
del first  # in the order in which they were made: that leaves a thread with a freed signal stack
gc.collect()
del second
gc.collect()
signal.raise_signal(signal.SIGTERM)
print(*seen)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO sets a signal stack on Linux only")
def test_signals_are_survived_after_networks_have_come_and_gone():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "signal"), done.stderr


@pytest.mark.parametrize(("mirror", "n"), [("horizontal", 2), ("both", 4)])
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_mirrored_positions_are_averaged_inside_the_network(tiny, images, kind, mirror, n):
    mirrored = tiny.with_spec(mirror=mirror)
    found = load_engine(mirrored, kind, "f32").run_unrounded(images)
    plain = TorchEngine(tiny, "f32", "cpu")
    turned = [images, images[:, :, ::-1], images[:, ::-1], images[:, ::-1, ::-1]][:n]
    expected = [plain.run_unrounded(np.ascontiguousarray(some)) for some in turned]
    for name in ("last", "stages"):
        np.testing.assert_allclose(
            found[name], np.mean([e[name] for e in expected], axis=0), rtol=2e-3, atol=2e-3, err_msg=name
        )
    alone = load_engine(mirrored, kind, "f32").run_unrounded(images[:1])  # another graph: batches of one
    np.testing.assert_allclose(alone["last"], found["last"][:1], rtol=1e-3, atol=1e-3)


def test_a_spec_without_mirrored_positions_is_written_as_before(tiny):
    assert "mirror" not in tiny.spec.as_dict()
    spec = tiny.with_spec(mirror="both").spec
    assert InputSpec.from_dict(spec.as_dict()) == spec
    with pytest.raises(ValueError, match="mirror"):
        InputSpec.from_dict(spec.as_dict() | {"mirror": "sideways"})


def test_a_device_that_is_not_there_is_named_and_the_cpu_always_is():
    import torch

    from topwork.features.engine import best_device, load_engine

    assert best_device("cpu") == "cpu"
    assert best_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, is_there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not is_there:
            with pytest.raises(UsageError, match=f"--device {name}: PyTorch finds no such device"):
                best_device(name)
    with pytest.raises(UsageError, match="--engine openvino runs on the CPU"):
        load_engine(None, "openvino", device="cuda")
