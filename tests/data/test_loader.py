"""Reading, hashing, decoding and resizing many images: in order, bounded, each content once; shards that survive."""

from __future__ import annotations

import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.drawn import encoded, scene
from topwork.data.images import decode
from topwork.data.loader import FactsStore, in_order, load_images
from topwork.data.samples import Entry
from topwork.data.shards import append_shard, read_shards, shard_files
from topwork.data.traits import VIEW, TraitStore, traits_of
from topwork.data.transforms import InputSpec, fit_to_input, resize
from topwork.errors import ImageError, TopworkError
from topwork.files import atomic_file


class Collector:
    """A visitor that wants what it has not seen."""

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.seen: dict[str, np.ndarray] = {}

    def wants(self, content_hash: str) -> bool:
        return content_hash not in self.seen

    def take(self, content_hash: str, pixels: np.ndarray) -> None:
        self.seen[content_hash] = pixels


DATA = {f"{n}.png": encoded(scene(40 + n, 30, seed=n), "PNG") for n in range(9)}


def read(entry: Entry) -> bytes:
    if entry.path not in DATA:
        raise ImageError("gone")
    return DATA[entry.path]


def test_results_come_in_order_and_only_a_few_ahead() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001 * (number % 3))
        with lock:
            running -= 1
        return number

    started: list[int] = []

    def counted(number: int) -> int:
        started.append(number)
        return work(number)

    results = in_order(counted, range(500), n_threads=3)
    assert next(results) == 0
    assert len(started) < 60  # the rest is not read ahead
    assert list(results) == list(range(1, 500))
    assert most <= 3


def test_an_error_in_the_work_reaches_the_caller_and_stops_the_rest() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 5:
            raise TopworkError("five")
        done.append(number)
        return number

    with pytest.raises(TopworkError, match="five"):
        list(in_order(work, range(10_000), n_threads=2))
    assert len(done) < 200


def test_facts_pixels_and_traits_in_one_pass(tmp_path) -> None:
    entries = [Entry(name, "a") for name in DATA] + [Entry("missing", "a")]
    visitor, facts, traits = Collector(InputSpec(48, 64, "pad")), FactsStore(tmp_path), TraitStore(tmp_path)
    loaded = list(load_images(entries, read, facts, visitor, 2, traits))
    assert [one.entry for one in loaded] == entries
    assert loaded[-1].reason == "gone"
    assert loaded[-1].content_hash == ""
    for one in loaded[:-1]:
        assert one.facts is not None
        assert (one.facts.width, one.facts.format, one.n_bytes) == (
            40 + int(one.entry.path[0]),
            "PNG",
            len(DATA[one.entry.path]),
        )
        np.testing.assert_array_equal(one.pixels, fit_to_input(decode(DATA[one.entry.path]).pixels, visitor.spec))
        assert one.traits is not None


def test_what_is_known_is_not_decoded_again_and_survives_the_process(tmp_path) -> None:
    facts = FactsStore(tmp_path)
    entries = [Entry("0.png", "a"), Entry("bad", "a")]
    data = {"0.png": DATA["0.png"], "bad": b"no image"}
    for one in load_images(entries, lambda entry: data[entry.path], facts):
        facts.put(one.content_hash, one.facts if one.facts is not None else str(one.reason))
    facts.flush()
    again = list(load_images(entries, lambda entry: data[entry.path], FactsStore(tmp_path)))
    assert again[0].pixels is None
    assert again[0].facts is not None
    assert "not an image" in str(again[1].reason)
    assert len(shard_files(facts.folder)) == 1


def test_traits_come_back_in_the_order_asked_for(tmp_path) -> None:
    store = TraitStore(tmp_path)
    made = {}
    for name, data in DATA.items():
        made[name] = traits_of(data, fit_to_input(decode(data).pixels, VIEW))
        store.put(name, made[name])
        if name == "4.png":
            store.flush()
    table = TraitStore(tmp_path).load(["7.png"])  # not written yet by the first store
    assert not table.numbers.any()
    order = ["8.png", "0.png", "unknown", "8.png"]
    store.flush()
    table = TraitStore(tmp_path).load(order)
    for place in (0, 1, 3):
        np.testing.assert_array_equal(table.numbers[place], made[order[place]].numbers)
        np.testing.assert_array_equal(table.thumbs[place], made[order[place]].thumb)
        np.testing.assert_array_equal(table.colors[place], made[order[place]].colors)
    assert not table.thumbs[2].any()


# ---- shards


def test_damaged_shards_are_removed_and_partial_files_ignored(tmp_path) -> None:
    for number in range(3):
        append_shard(tmp_path, pa.table({"x": [number]}))
    damaged = shard_files(tmp_path)[1]
    damaged.write_bytes(damaged.read_bytes()[:40])
    (tmp_path / ".shard-x.parquet.1234.partial").write_bytes(b"half")
    found = [table["x"].to_pylist() for _, table in read_shards(tmp_path, ["x"])]
    assert len(found) == 2
    assert len(shard_files(tmp_path)) == 2


def test_a_file_at_its_final_name_is_whole_or_the_old_one(tmp_path) -> None:
    final = tmp_path / "x.json"
    with atomic_file(final) as partial:
        partial.write_text("old")

    def fail() -> None:
        with atomic_file(final) as partial:
            partial.write_text("half of the new")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert final.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TopworkError, match="TOPWORK_CACHE"):
        append_shard(tmp_path / "file" / "inside", pa.table({"x": [1]}))
    assert pq  # the reader is the one the shards are written for


# ---- transforms


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (300, 2), (48, 64), (37, 91), (600, 401)])
def test_every_shape_becomes_the_input(fit, size) -> None:
    spec = InputSpec(48, 64, fit)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = fit_to_input(pixels, spec)
    assert out.shape == (48, 64, 3)
    assert out.dtype == np.uint8
    flat = fit_to_input(np.full((*size, 3), 77, np.uint8), spec)
    background = np.array(spec.background)
    assert ((flat == 77).all(2) | ((flat == background).all(2) & (fit == "pad"))).all()


def test_squash_keeps_corners_crop_keeps_the_middle_pad_keeps_the_shape() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :50] = (255, 0, 0)  # the left quarter
    squash, crop, pad = (fit_to_input(pixels, InputSpec(40, 40, fit)) for fit in ("squash", "crop", "pad"))
    assert (squash[:, :9, 0] == 255).all()
    assert crop.max() <= 5 or not (crop[:, 5:, 0] > 5).any()  # the middle half holds none of it but the edge
    assert (pad[:10] == 128).all()
    assert (pad[12:28, :9, 0] > 250).all()
    assert (pad[30:] == 128).all()


def test_resizing_agrees_with_pillow_and_a_box_is_a_crop() -> None:
    from PIL import Image

    pixels = scene(160, 120)
    for name, filter_ in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        reference = np.asarray(Image.fromarray(pixels).resize((50, 40), filter_), int)
        difference = abs(resize(pixels, 40, 50, name).astype(int) - reference)
        assert difference.max() <= 5  # at the hard edges, where both round twice
        assert difference.mean() < 0.3
    boxed = resize(pixels, 30, 30, box=(10, 20, 90, 60))
    cut = resize(np.ascontiguousarray(pixels[20:80, 10:100]), 30, 30)
    assert abs(boxed.astype(int) - cut).max() <= 1


def test_threads_share_nothing() -> None:
    pixels = [scene(100 + n, 80, seed=n) for n in range(20)]
    alone = [resize(one, 32, 32).tobytes() for one in pixels]
    assert list(in_order(lambda one: resize(one, 32, 32).tobytes(), pixels * 5, 4)) == alone * 5


def test_a_spec_comes_back_from_json() -> None:
    spec = InputSpec(48, 64, "crop", 0.875, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (1, 2, 3))
    assert InputSpec.from_dict(spec.as_dict()) == spec
