"""Each content is embedded once; what is stored is what was computed; a killed run keeps its finished shards."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from drawing import draw_folders
from topwork.data.images import decode
from topwork.data.manifest import scan
from topwork.data.transforms import fit_to_input
from topwork.errors import TopworkError
from topwork.features.embed import Embedder, FeatureStore, embed
from topwork.features.engine import Engine, fingerprint, load_engine
from topwork.models.backbone import load_backbone


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("random:test_efficientnet")


@pytest.fixture
def embedder(tiny, tmp_path):
    engine = load_engine(tiny)
    return Embedder(tiny, engine, FeatureStore(tmp_path / "cache", fingerprint(tiny, engine)))


def test_stored_features_are_the_computed_ones(tiny, embedder, tmp_path):
    manifest = scan(draw_folders(tmp_path / "data"))
    features = embed(tiny, manifest, embedder=embedder)
    row = 5
    pixels = fit_to_input(decode(manifest.read(row), min_side=tiny.spec.min_side).pixels, tiny.spec)
    fresh = embedder.engine.run(pixels[None])
    for name in ("last", "stages"):
        np.testing.assert_array_equal(features.block(name)[row], fresh[name][0])
        np.testing.assert_array_equal(features.block(name, [row, 0])[0], fresh[name][0])


def test_scanning_and_embedding_are_one_pass(tiny, embedder, tmp_path, monkeypatch):
    from topwork.data import loader

    calls = []
    monkeypatch.setattr(loader, "decode", lambda data, **kw: calls.append(1) or decode(data, **kw))
    folder = draw_folders(tmp_path / "data", n_each=8)
    manifest = scan(folder, visitor=embedder)
    embedder.flush()
    embed(tiny, manifest, embedder=embedder)
    assert len(calls) == 16
    scan(folder, visitor=embedder)
    assert len(calls) == 16, "known facts and features must need no decoding"


def test_a_second_process_embeds_nothing(tiny, embedder, tmp_path):
    manifest = scan(draw_folders(tmp_path / "data"))
    first = embed(tiny, manifest, embedder=embedder)
    again = Embedder(tiny, embedder.engine, FeatureStore(tmp_path / "cache", fingerprint(tiny, embedder.engine)))
    second = embed(tiny, manifest, embedder=again)
    assert again.n_embedded == 0
    np.testing.assert_array_equal(first.block("last"), second.block("last"))


def test_the_same_content_under_two_names_is_embedded_once(tiny, embedder, tmp_path):
    folder = draw_folders(tmp_path / "data", n_each=3)
    (folder / "disc" / "copy.jpg").write_bytes((folder / "disc" / "disc_0.jpg").read_bytes())
    features = embed(tiny, scan(folder), embedder=embedder)
    assert embedder.n_embedded == 6
    assert len(features) == 7


def test_an_image_that_changed_since_the_scan_is_named(tiny, embedder, tmp_path):
    folder = draw_folders(tmp_path / "data", n_each=3)
    manifest = scan(folder)
    (folder / "disc" / "disc_1.jpg").unlink()
    with pytest.raises(TopworkError, match=r"disc/disc_1\.jpg"):
        embed(tiny, manifest, embedder=embedder)


def test_a_damaged_shard_is_computed_again(tiny, embedder, tmp_path):
    manifest = scan(draw_folders(tmp_path / "data", n_each=3))
    before = embed(tiny, manifest, embedder=embedder).block("last")
    for shard in embedder.store.folder.glob("shard-*.parquet"):
        shard.write_bytes(shard.read_bytes()[:100])
    again = Embedder(tiny, embedder.engine, FeatureStore(tmp_path / "cache", fingerprint(tiny, embedder.engine)))
    np.testing.assert_array_equal(embed(tiny, manifest, embedder=again).block("last"), before)
    assert again.n_embedded == 6


@pytest.mark.parametrize(("value", "said"), [(np.nan, "not finite"), (1e9, "above 65,504"), (-np.inf, "above 65,504")])
def test_features_that_cannot_be_stored_stop_the_run(tiny, embedder, value, said):
    class Broken(Engine):
        kind, precision = "broken", "f32"

        def run_unrounded(self, images):
            return {
                "last": np.full((len(images), 4), value, np.float32),
                "stages": np.zeros((len(images), 0), np.float32),
            }

    embedder.engine = Broken()
    embedder.take("a" * 64, np.zeros((tiny.spec.height, tiny.spec.width, 3), np.uint8))
    with pytest.raises(TopworkError, match=said):
        embedder.flush()


def test_a_killed_run_keeps_its_finished_shards(tmp_path, own_cache):
    """SIGKILL in the middle: what is at its final name is whole, and the next run goes on from there."""
    folder = draw_folders(tmp_path / "data", n_each=60)
    program = (
        "import time\nfrom topwork.features import embed as e\ne.ROWS_PER_SHARD = 16\n"
        "from topwork.models.backbone import load_backbone\nfrom topwork.data.manifest import scan\n"
        "b = load_backbone('random:test_efficientnet')\nm = e.Embedder(b)\n"
        "run = m.engine.run\nm.engine.run = lambda x: (time.sleep(0.05), run(x))[1]\n"
        f"scan({str(folder)!r}, visitor=m)\nm.flush()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    shards = own_cache / "features"
    deadline = time.monotonic() + 600
    while len(list(shards.glob("*/shard-*.parquet"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = FeatureStore(tmp_path / "cache", next(shards.iterdir()).name)
    assert 48 <= len(kept) < 120
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(FeatureStore(tmp_path / "cache", kept.folder.name)) == 120
