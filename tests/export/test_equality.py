"""One model folder, one answer: by the command, Python, timm, transformers, ONNX, OpenVINO and HTTP.

Every way starts from the image files. The command, the library and the server must agree to the last digit; the others
prepare images with Pillow and compute in f32 from beginning to end, and must name the same class, with probabilities
within ``TOLERANCE``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.serving import form, serving
from terminal import topwork
from topwork.commands.fit import fit
from topwork.export.package import TOLERANCE, export_model, run_script
from topwork.export.predictor import Predictor
from topwork.models.classifier import load_classifier
from topwork.settings import FitSettings


def table(rows, classes):
    """(N, C) probabilities from rows of (class name, probability) pairs."""
    return np.array([[dict(row)[name] for name in classes] for row in rows])


def by_library(run, paths, classes):
    return table([p.top for p in Predictor(run, n_top=len(classes)).predict(paths)], classes)


def by_command(run, paths, classes, folder):
    out = folder / "rows.jsonl"
    done = topwork("predict", run, "-", "--out", out, "--top", len(classes), input="\n".join(paths))
    assert done.returncode == 0, done.stderr
    return table([json.loads(line)["top"] for line in out.read_text().splitlines()], classes)


def by_http(run, paths, classes):
    found = []
    with serving(run) as served:
        for start in range(0, len(paths), 50):
            body, headers = form(*[(path, Path(path).read_bytes()) for path in paths[start : start + 50]])
            status, answer, _ = served.ask("POST", f"/predict?top={len(classes)}", body, headers)
            assert status == 200
            found += [row["top"] for row in answer["predictions"]]
    return table(found, classes)


def by_timm(run, paths):
    """timm alone, with the preprocessing that its own config.json asks for."""
    import timm
    import torch

    torch.set_num_threads(1)  # one image at a time: two threads mostly wait for one another on a busy machine
    network = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    with torch.inference_mode():
        return np.concatenate(
            [network(transform(Image.open(path).convert("RGB"))[None]).softmax(1).numpy() for path in paths]
        )


def by_transformers(run, paths, classes):
    import torch
    from transformers import pipeline

    torch.set_num_threads(1)
    ask = pipeline("image-classification", model=str(run / "model"), device="cpu")
    rows = ask(list(paths), top_k=len(classes))
    return table([[(answer["label"], answer["score"]) for answer in row] for row in rows], classes)


def by_script(run, to, paths, folder):
    place = folder / to
    place.mkdir()
    package = export_model(run, to, place / ("m.onnx" if to == "onnx" else "m.xml"), check=paths[:4])
    return np.array([row["probabilities"] for row in run_script(package.script, paths)])


def check_all(run, paths, folder):
    """Asserts that all ways agree; returns the largest difference of each."""
    classes = load_classifier(run).classes
    reference = by_library(run, paths, classes)
    np.testing.assert_array_equal(reference, by_command(run, paths, classes, folder))
    np.testing.assert_array_equal(reference, by_http(run, paths, classes))
    ways = {to: by_script(run, to, paths, folder) for to in ("onnx", "openvino")}
    if (run / "model" / "config.json").exists():
        ways["timm"] = by_timm(run, paths)
        if importlib.util.find_spec("transformers"):
            ways["transformers"] = by_transformers(run, paths, classes)
    differences = {}
    for name, found in ways.items():
        different = [paths[row] for row in np.flatnonzero(found.argmax(1) != reference.argmax(1))]
        assert different == [], name
        differences[name] = float(np.abs(found - reference).max())
        assert differences[name] <= TOLERANCE, name
    return differences


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["plain", pytest.param("extended", marks=pytest.mark.slow)])
def test_all_ways_agree_on_drawn_images(runs, images, tmp_path, head):
    differences = check_all(runs[head], images, tmp_path)
    assert max(differences.values()) > 0, "they were computed, not copied"


@pytest.fixture(scope="module", params=["ants-bees auto", "ants-bees f32", "caltech-mini auto", "caltech-mini f32"])
def photographs(shared_data, tmp_path_factory, request):
    """A run on real photographs, all of their paths, and what the library answers."""
    name, precision = request.param.split()
    run = tmp_path_factory.mktemp("photographs") / "run"
    fit(shared_data / name, run, FitSettings(precision=precision))
    folder = shared_data / ("ants-bees/val" if name == "ants-bees" else name)
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    return run, paths, by_library(run, paths, load_classifier(run).classes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["command", "http", "onnx", "openvino", "timm", "transformers"])
def test_all_ways_agree_on_photographs(photographs, tmp_path, way, request):
    run, paths, reference = photographs
    classes = load_classifier(run).classes
    if way == "transformers":
        pytest.importorskip("transformers", reason="transformers is not installed")
    ways = {
        "command": lambda: by_command(run, paths, classes, tmp_path),
        "http": lambda: by_http(run, paths, classes),
        "onnx": lambda: by_script(run, "onnx", paths, tmp_path),
        "openvino": lambda: by_script(run, "openvino", paths, tmp_path),
        "timm": lambda: by_timm(run, paths),
        "transformers": lambda: by_transformers(run, paths, classes),
    }
    found = ways[way]()
    difference = float(np.abs(found - reference).max())
    print(request.node.name, len(paths), difference)  # noqa: T201 - the figures, under pytest -s
    assert [paths[row] for row in np.flatnonzero(found.argmax(1) != reference.argmax(1))] == []
    assert difference <= (0 if way in ("command", "http") else TOLERANCE)
