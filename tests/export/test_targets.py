"""Exports answer as the original, by themselves; what does not is not kept, and says why."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terminal import topwork
from topwork.data.images import decode
from topwork.data.manifest import load_manifest
from topwork.data.transforms import InputSpec, fit_to_input
from topwork.errors import TopworkError, UsageError
from topwork.export import package, standalone, targets
from topwork.export.package import export_model, run_script
from topwork.export.predictor import Predictor
from topwork.models.classifier import load_classifier

ENDING = {"onnx": "onnx", "openvino": "xml", "pt2": "pt2"}


def exported(run, to, folder, **options):
    return export_model(run, to, folder / f"model.{ENDING[to]}", **options)


def check_certificate(made):
    certificate = made.certificate
    assert (certificate.n_compared, certificate.n_same) == (48, 48)
    assert certificate.max_difference <= certificate.tolerance
    assert certificate.graph_difference < 1e-5
    stored = json.loads(made.certificate_path.read_text())
    assert stored["passed"] is True
    assert stored["sha256"] == certificate.sha256


@pytest.mark.parametrize("to", targets.TARGETS)
def test_an_export_answers_as_the_original(exports, to):
    check_certificate(exports[to])


@pytest.mark.parametrize("to", targets.TARGETS)
def test_a_model_with_mirrored_positions_is_exported(runs, tmp_path, to):
    classifier = load_classifier(runs["plain"])
    mirrored = replace(classifier, backbone=classifier.backbone.with_spec(mirror="horizontal"))
    path, spec = tmp_path / f"model.{ENDING[to]}", mirrored.backbone.spec
    targets.export_classifier(mirrored, to, path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, spec.height, spec.width, 3), dtype=np.uint8)
    answers = Predictor(mirrored, runtime="torch").answer(pixels)[0]
    assert targets.TARGETS[to].open(path)(pixels) == pytest.approx(answers, abs=1e-4)


@pytest.mark.parametrize("to", ["onnx", "openvino", pytest.param("pt2", marks=pytest.mark.slow)])
def test_an_extended_head_is_exported_alone_with_its_script(runs, images, tmp_path, to):
    check_certificate(exported(runs["extended"], to, tmp_path, check=images))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"model.{ENDING[to]}",
        "model.parity.json",
        "predict.py",
        *(["model.bin"] if to == "openvino" else []),
    }


def test_onnx_is_one_file_that_describes_itself(exports, runs):
    import onnx

    made = exports["onnx"]
    model = onnx.load(str(made.exported), load_external_data=False)
    assert not any(t.external_data for t in model.graph.initializer)
    assert model.opset_import[0].version == targets.OPSET
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == ["cross", "disc", "square"]
    assert InputSpec.from_dict(json.loads(facts["preprocessing"])) == load_classifier(runs["plain"]).backbone.spec
    batch, height, width, channels = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert (height.dim_value, width.dim_value, channels.dim_value) == (160, 160, 3)


def test_the_script_needs_nothing_of_topwork(exports, runs, images):
    """numpy, Pillow and onnxruntime: the imports say so, and an interpreter that cannot find the rest runs it."""
    made = exports["onnx"]
    tree = ast.parse(made.script.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) <= {"numpy", "PIL", "onnxruntime", "openvino", "torch"}
    hidden = "import sys; sys.modules.update(dict.fromkeys(['topwork', 'torch', 'timm', 'openvino']))"
    program = f"{hidden}\nimport runpy; sys.argv = ['predict.py', *sys.argv[1:]]\nrunpy.run_path({str(made.script)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, images[0], "--top", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = Predictor(runs["plain"]).predict([images[0]])[0]
    assert answer.label in done.stdout.splitlines()[1]


def test_the_script_names_what_it_cannot_read(exports, images, tmp_path):
    made = exports["onnx"]
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    rows = run_script(made.script, [images[0], str(tmp_path / "broken.jpg"), images[1]])
    assert ["error" in row for row in rows] == [False, True, False]


@pytest.mark.parametrize(("to", "ending"), [("onnx", "onnx"), ("openvino", "xml"), ("openvino", "bin")])
def test_an_export_that_was_altered_is_refused(exports, images, tmp_path, to, ending):
    folder = shutil.copytree(exports[to].exported.parent, tmp_path / "copy")
    path = folder / f"model.{ending}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, folder / exports[to].script.name, images[0]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"model.{ending}: damaged or altered; export the model again.\n"


def test_class_names_cannot_become_code(runs, tmp_path):
    names = ("'''); import os; os._exit(9) #", '\\\n"""{}', "naïve 🐜 \u2028")
    classifier = replace(load_classifier(runs["plain"]), classes=names)
    script = tmp_path / "predict.py"
    script.write_text(targets.standalone_script(classifier, Path("m.onnx"), targets.TARGETS["onnx"]), encoding="utf-8")
    program = f"import runpy, json; print(json.dumps(runpy.run_path({str(script)!r})['SETTINGS']['classes']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert tuple(json.loads(done.stdout)) == names


def test_an_export_that_answers_differently_is_not_kept(runs, images, tmp_path, monkeypatch):
    """A temperature forgotten would pass; classes in another order must not."""
    real = targets.classifier_network

    def wrong(classifier):
        head = replace(
            classifier.head, weight=classifier.head.weight[::-1].copy(), bias=classifier.head.bias[::-1].copy()
        )
        return real(replace(classifier, head=head))

    monkeypatch.setattr(targets, "classifier_network", wrong)
    with pytest.raises(TopworkError, match="and was discarded") as caught:
        exported(runs["plain"], "onnx", tmp_path, check=images[:12])
    assert [p.name for p in tmp_path.iterdir()] == ["model.parity-failed.json"]
    record = json.loads((tmp_path / "model.parity-failed.json").read_text())
    assert record["passed"] is False
    assert record["different"][0]["path"] in str(caught.value)


def test_wrong_names_are_refused(runs, tmp_path):
    with pytest.raises(UsageError, match=r"end in \.xml"):
        export_model(runs["plain"], "openvino", tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="one of onnx, openvino, pt2"):
        export_model(runs["plain"], "coreml", tmp_path / "model.mlpackage")


def test_folders_above_the_export_are_made(runs, images, tmp_path):
    assert exported(runs["plain"], "onnx", tmp_path / "not" / "there", check=images[:1]).exported.is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(TopworkError, match="cannot be written: not a directory"):
        exported(runs["plain"], "onnx", tmp_path / "file" / "below", check=images[:1])


def test_exports_to_all_formats_stand_in_one_folder(exports, runs, images):
    made = list(exports.values())
    folder = made[0].exported.parent
    assert (folder / "predict.py").read_text() == "mine"
    assert [one.script.name for one in made] == ["predict_onnx.py", "predict_openvino.py", "predict_pt2.py"]
    assert len({one.certificate_path for one in made}) == 3
    with pytest.raises(UsageError, match="exists already"):
        exported(runs["plain"], "onnx", folder, check=images[:3])
    again = exported(runs["plain"], "onnx", folder, check=images[:3], overwrite=True)
    assert again.script == made[0].script


def test_nothing_readable_to_check_with_is_named(runs, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="could be read"):
        exported(runs["plain"], "onnx", tmp_path, check=[str(tmp_path / "a.jpg")])


# ---- preprocessing: three ways, one result


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(97, 61), (640, 480), (50, 300), (224, 224)])
def test_the_script_prepares_as_topwork_does(fit, size):
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    spec = InputSpec(height=96, width=128, fit=fit, crop_fraction=0.9 if fit == "crop" else 1.0)
    ours = fit_to_input(np.asarray(image), replace(spec, resizer="pillow"))
    np.testing.assert_array_equal(ours, standalone.fit(image, spec.as_dict()))
    assert np.abs(ours.astype(int) - fit_to_input(np.asarray(image), spec)).max() <= 1, "the quick resize is near"


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "I;16", "1", "CMYK", "turned"])
def test_the_reference_decoder_sees_what_topwork_sees(tmp_path, mode):
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)
    path, options = tmp_path / f"image.{'jpg' if mode in ('CMYK', 'turned') else 'png'}", {}
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4096, (40, 60)).astype(np.uint16))
    elif mode == "turned":
        image, exif = Image.fromarray(pixels[..., :3]), Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    else:
        image = Image.fromarray(pixels, "RGBA").convert(mode)
    image.save(path, **options)
    ours, theirs = decode(path.read_bytes()).pixels, np.asarray(standalone.decode(path, min_side=256))
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("side", [447, 448, 894, 895, 896, 1791, 3300])
def test_large_photographs_are_shrunk_alike(tmp_path, side):
    """By the script as by topwork; a photo of today's size within a few levels of the whole way, on average far below one."""
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    coarse.resize((side + side // 3, side), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=92)
    spec, data = InputSpec(resizer="pillow"), (tmp_path / "large.jpg").read_bytes()
    ours = fit_to_input(decode(data, min_side=spec.min_side).pixels, spec).astype(int)
    np.testing.assert_array_equal(ours, standalone.prepare(tmp_path / "large.jpg", spec.as_dict()))
    if side > 3000:
        whole = fit_to_input(decode(data).pixels, spec)
        assert np.abs(whole - ours).max() <= 3
        assert np.abs(whole - ours).mean() < 0.5


# ---- eight bits


@pytest.mark.filterwarnings("ignore")  # of nncf, about packages that it need not use here
@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_eight_bits_are_smaller_and_the_cost_is_stated(runs, tmp_path, to, monkeypatch):
    pytest.importorskip("nncf")
    monkeypatch.setattr(package, "N_IMAGES", 8)
    monkeypatch.setattr(package, "LEAST_SAME_INT8", 0.5)  # a random network is unsure everywhere
    small = exported(runs["plain"], to, tmp_path, int8=True)
    n_bytes = small.exported.with_suffix(".bin" if to == "openvino" else ".onnx").stat().st_size
    assert n_bytes < 0.6 * (runs["plain"] / "model" / "model.safetensors").stat().st_size
    cost, stored = small.certificate.cost, json.loads(small.certificate_path.read_text())
    right = [p.label == Path(p.path).parent.name for p in Predictor(runs["plain"]).predict(held_out(runs["plain"]))]
    assert cost.n == len(right) == small.certificate.n_compared
    assert cost.accuracy_before == np.mean(right)
    rows = run_script(small.script, held_out(runs["plain"]))
    assert cost.accuracy_after == np.mean([row["label"] == Path(row["path"]).parent.name for row in rows])
    assert cost.low <= cost.difference <= cost.high
    assert stored["cost"]["difference"] == cost.difference
    assert stored["is_int8"] is True
    assert small.certificate.max_difference > 1e-4, "eight bits are not exact: it was quantized"


def held_out(run):
    parts = json.loads((run / "split.json").read_text())["parts"]
    root = load_manifest(run / "manifest.parquet").root
    return [str(root / item["path"]) for name in ("test", "valid") for item in parts[name]]


def test_eight_bits_that_answer_otherwise_are_not_kept(runs, images, tmp_path, monkeypatch):
    """The wrong network in place of a quantizer that went wrong."""
    monkeypatch.setattr(package, "_calibration", lambda *_: np.zeros((1, 160, 160, 3), np.uint8))
    monkeypatch.setattr(targets, "quantized", lambda model, *_: inverted(model))
    with pytest.raises(TopworkError, match="with 8 bits, only"):
        exported(runs["plain"], "onnx", tmp_path, int8=True, check=images)
    assert [p.name for p in tmp_path.iterdir()] == ["model.parity-failed.json"]


def inverted(model):
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if tensor.name.startswith("head."):
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return model


def test_eight_bits_need_images_and_a_format(runs, tmp_path):
    with pytest.raises(UsageError, match="--calibrate"):
        exported(runs["plain"] / "model", "onnx", tmp_path, int8=True)
    with pytest.raises(UsageError, match="--to onnx and --to openvino"):
        exported(runs["plain"], "pt2", tmp_path, int8=True)
    assert list(tmp_path.iterdir()) == []


# ---- the command


def test_export_as_a_command(runs, images, tmp_path):
    command = ["export", runs["extended"], "--to", "onnx", "--out", tmp_path / "m.onnx"]
    done = topwork(*command, "--check", *images[:6], "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["passed"], answer["n_same"], answer["format"]) == (True, 6, f"ONNX, opset {targets.OPSET}")
    done = topwork(*command)
    assert done.returncode == 2
    assert "exists already" in done.stderr
