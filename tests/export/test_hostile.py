"""Model folders from somebody else: nothing in them runs, and damage is a named error or makes no difference.

Mutations run in a process of their own, so that a crash of a native library would be seen as one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from topwork.errors import TopworkError
from topwork.export.inputs import list_inputs
from topwork.export.predictor import Predictor
from topwork.models.classifier import facts_digest, load_classifier

GOLDEN = Path(__file__).parents[1] / "golden"


# ---- models of older versions


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("format-*")), ids=lambda folder: folder.name)
def test_a_golden_folder_answers_as_it_did(folder):
    expected = json.loads((folder / "answers.json").read_text())
    found = [asdict(p) for p in Predictor(folder / "model").predict([folder / row["path"] for row in expected])]
    for new, old in zip(found, expected, strict=True):
        assert (new["outcome"], new["label"]) == (old["outcome"], old["label"])
        assert [name for name, _ in new["top"]] == [name for name, _ in old["top"]]
        np.testing.assert_allclose([p for _, p in new["top"]], [p for _, p in old["top"]], atol=1e-3)


def test_there_is_a_golden_folder_for_every_format():
    from topwork.models.classifier import FORMAT

    assert [folder.name for folder in sorted(GOLDEN.glob("format-*"))] == [f"format-{n}" for n in range(1, FORMAT + 1)]
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < 2_000_000


# ---- mutations

PROGRAM = """
import json, sys, warnings
from dataclasses import asdict
from pathlib import Path
from topwork.errors import TopworkError
from topwork.export.predictor import Predictor
warnings.simplefilter("ignore")
photo = sys.argv[1]
for line in sys.stdin:
    try:
        print(json.dumps([asdict(p) for p in Predictor(line.strip()).predict([photo])]), flush=True)
    except TopworkError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
"""


def answers_of(folders, photo):
    """What a fresh process makes of each folder; fewer answers than folders mean that it crashed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(photo)],
        input="\n".join(map(str, folders)),
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # native libraries quote what they were given
        check=False,
        timeout=600,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr[-2000:]


def mutate(folder: Path, rng: random.Random) -> None:
    """One kind of damage to one file."""
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "grow", "swap", "remove", "zeros", "text"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 4, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "grow":
        data += rng.randbytes(rng.randint(1, 200))
    elif kind == "zeros":
        start = rng.randrange(len(data))
        data[start : start + 100] = bytes(len(data[start : start + 100]))
    elif kind == "text":
        data = bytearray(
            data.replace(*rng.choice([(b'"disc"', b'"dusk"'), (b"0.", b"1."), (b"1", b"2"), (b"bf16", b"f64")]), 1)
        )
    elif kind == "swap":
        data = bytearray(rng.choice(sorted(folder.iterdir())).read_bytes())
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(data)


def sign(folder: Path) -> None:
    """Makes all digests right again, as an attacker would."""
    try:
        facts = json.loads((folder / "topwork.json").read_text())
        facts["files"] = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in facts["files"]
            if (folder / name).exists()
        }
        (folder / "topwork.json").write_text(json.dumps(facts | {"digest": facts_digest(facts)}))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return  # no longer a description at all


def run_mutations(tmp_path, n, seed, is_signed):
    golden = GOLDEN / "format-1"
    rng = random.Random(seed)
    folders = []
    for number in range(n):
        folders.append(tmp_path / str(number))
        shutil.copytree(golden / "model", folders[-1])
        mutate(folders[-1], rng)
        if is_signed:
            sign(folders[-1])
    found, trouble = answers_of([golden / "model", *folders], golden / "disc.jpg")
    assert len(found) == n + 1, f"it crashed at {folders[len(found) - 1]}: {trouble}"
    for folder in folders:
        shutil.rmtree(folder)
    return found[0], found[1:]


@pytest.mark.parametrize("seed", [0])
def test_a_damaged_folder_is_named_or_answers_the_same(tmp_path, seed):
    check_damaged(tmp_path, 40, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_1600_damaged_folders_are_named_or_answer_the_same(tmp_path, seed):
    check_damaged(tmp_path, 160, seed)


def check_damaged(tmp_path, n, seed):
    sound, found = run_mutations(tmp_path, n, seed, is_signed=False)
    refused = [answer["refused"] for answer in found if isinstance(answer, dict)]
    assert all(str(tmp_path) in text for text in refused), "each names the file"
    assert all(answer == sound for answer in found if not isinstance(answer, dict))
    assert len(refused) > 0.7 * n


def test_a_forged_folder_never_crashes(tmp_path):
    """Every digest is right again: it may answer anything, but only answer or refuse."""
    check_forged(tmp_path, 8, 100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(101, 105))
def test_400_forged_folders_never_crash(tmp_path, seed):
    check_forged(tmp_path, 100, seed)


def check_forged(tmp_path, n, seed):
    _, found = run_mutations(tmp_path, n, seed, is_signed=True)
    assert {type(answer) for answer in found} <= {list, dict}
    assert any(isinstance(answer, dict) for answer in found)


# ---- canaries: pickles that would leave a file behind


class Canary:
    """Writes a file when somebody unpickles it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


def canaries(place: Path) -> dict[str, bytes]:
    """The forms in which a pickle travels."""
    import io

    import torch

    plain = pickle.dumps(Canary(place))
    buffer, legacy = io.BytesIO(), io.BytesIO()
    torch.save(Canary(place), buffer)
    torch.save(Canary(place), legacy, _use_new_zipfile_serialization=False)
    array = io.BytesIO()
    np.save(array, np.array([Canary(place)], dtype=object), allow_pickle=True)
    return {"pickle": plain, "torch": buffer.getvalue(), "old torch": legacy.getvalue(), "numpy": array.getvalue()}


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "numpy"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "decision.safetensors", "openvino.bin", "openvino.xml", "config.json", "topwork.json"]
)
def test_a_canary_in_a_model_folder_never_runs(tmp_path, kind, name):
    shutil.copytree(GOLDEN / "format-1" / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(canaries(tmp_path / "ran")[kind])
    sign(tmp_path / "model")
    with contextlib.suppress(TopworkError):
        Predictor(tmp_path / "model").predict([GOLDEN / "format-1" / "disc.jpg"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pkl", "data.pkl", "openvino.pkl", "sitecustomize.py", "__init__.py"]
)
def test_a_canary_beside_the_model_is_not_looked_at(tmp_path, name):
    shutil.copytree(GOLDEN / "format-1" / "model", tmp_path / "model")
    content = (
        f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
        if name.endswith(".py")
        else canaries(tmp_path / "ran")["pickle"]
    )
    (tmp_path / "model" / name).write_bytes(content)
    load_classifier(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "numpy"])
def test_a_canary_as_weights_or_image_never_runs(tmp_path, kind):
    from topwork.models.backbone import load_backbone

    data = canaries(tmp_path / "ran")[kind]
    for name in ("weights.pth", "weights.safetensors", "photo.jpg"):
        (tmp_path / name).write_bytes(data)
    for name in ("weights.pth", "weights.safetensors"):
        with pytest.raises(TopworkError):
            load_backbone(f"test_efficientnet={tmp_path / name}")
    assert Predictor(GOLDEN / "format-1" / "model").predict([tmp_path / "photo.jpg"])[0].outcome == "error"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_a_canary_in_an_archive_never_runs(tmp_path, ending):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    archive = tmp_path / f"images.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.write(tmp_path / "data.pkl", "data.pkl")
            file.write(GOLDEN / "format-1" / "disc.jpg", "../../disc.jpg")
    else:
        with tarfile.open(archive, "w:gz" if ending == "tar.gz" else "w") as file:
            file.add(tmp_path / "data.pkl", "data.pkl")
            file.add(GOLDEN / "format-1" / "disc.jpg", "../../disc.jpg")
    before = set(tmp_path.rglob("*"))
    answers = Predictor(GOLDEN / "format-1" / "model").predict(list_inputs([str(archive)]))
    assert [answer.outcome for answer in answers] == ["error", "error"]
    assert "outside" in answers[1].error
    assert set(tmp_path.rglob("*")) == before
