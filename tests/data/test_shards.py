import logging
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topwork.data import shards
from topwork.data.shards import DAMAGE, append_shard, check_writable, read_parquet, read_shards
from topwork.errors import TopworkError
from topwork.features.embed import FeatureStore


def test_folder_names_are_no_columns_and_missing_columns_are_named(tmp_path):
    folder = tmp_path / "lens=wide"
    folder.mkdir()
    path = folder / "shard-1-00000000.parquet"
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), path)
    assert read_parquet(path).column_names == ["a", "b"]
    assert read_parquet(path, ["b"]).to_pydict() == {"b": ["x", "y"]}
    with pytest.raises(KeyError, match="c"):
        read_parquet(path, ["a", "c"])
    (folder / "shard-2-00000000.parquet").write_bytes(b"damaged")
    assert [found.name for found, _ in read_shards(folder, ["a"], verify=False)] == ["shard-1-00000000.parquet"]
    assert not list(read_shards(folder, ["a"]))


def test_shards_of_older_versions_are_passed_over_without_a_word(tmp_path, caplog):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "shard-1.parquet")
    assert not list(read_shards(tmp_path, ["a"]))
    assert not caplog.records
    assert (tmp_path / "shard-1.parquet").exists()


def features(n=40):
    rng = np.random.default_rng(0)
    hashes = [f"{number:064x}" for number in range(n)]
    blocks = {"last": rng.normal(size=(n, 24)), "stages": rng.normal(size=(n, 56))}
    return hashes, {name: values.astype(np.float16) for name, values in blocks.items()}


def stored(folder):
    hashes, blocks = features()
    store = FeatureStore(folder, "f")
    for start in range(0, 40, 20):
        store.put(hashes[start : start + 20], {name: values[start : start + 20] for name, values in blocks.items()})
    return hashes, blocks, sorted(store.folder.iterdir())


def test_any_flipped_bit_is_noticed_or_does_no_harm(tmp_path, caplog):
    """Never another value: what is damaged is not known any more, and the other shard is."""
    hashes, blocks, files = stored(tmp_path)
    sound = files[0].read_bytes()
    own = set(read_parquet(files[0], ["content_hash"])["content_hash"].to_pylist())
    rng = random.Random(0)
    n_noticed = 0
    caplog.set_level(logging.CRITICAL)
    for _ in range(400):
        files[0].unlink(missing_ok=True)
        wrong = bytearray(sound)
        wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
        files[0].write_bytes(wrong)
        store = FeatureStore(tmp_path, "f")
        known = [key for key in hashes if key in store]
        assert set(hashes) - own <= set(known)
        n_noticed += len(known) < 40
        for name in blocks:
            assert np.array_equal(store.load(known, name), blocks[name][[hashes.index(key) for key in known]])
    assert n_noticed == 400


@pytest.mark.parametrize("damage", ["empty", "half", "another format", "flipped"])
def test_a_damaged_shard_is_made_again_with_one_note(damage, tmp_path, monkeypatch):
    # A logger of the test's own: what other libraries in this process do to the shared ones does not matter.
    messages = []
    log = logging.Logger("topwork.cache")
    log.addFilter(lambda record: messages.append(record.getMessage()))
    monkeypatch.setattr(shards, "_LOG", log)
    hashes, blocks, files = stored(tmp_path)
    data = files[0].read_bytes()
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"key": ["x"]}), other)
    place = len(data) // 3
    files[0].write_bytes(
        {
            "empty": b"",
            "half": data[: len(data) // 2],
            "another format": other.read_bytes(),
            "flipped": data[:place] + bytes([data[place] ^ 128]) + data[place + 1 :],
        }[damage]
    )
    store = FeatureStore(tmp_path, "f")
    missing = [key for key in hashes if key not in store]
    assert len(missing) == 20
    (note,) = messages
    assert str(files[0]) in note
    assert "computed again" in note
    assert not files[0].exists()
    rows = [hashes.index(key) for key in missing]
    store.put(missing, {name: values[rows] for name, values in blocks.items()})
    again = FeatureStore(tmp_path, "f")
    assert all(key in again for key in hashes)
    assert np.array_equal(again.load(hashes, "stages"), blocks["stages"])


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for write in (check_writable, lambda folder: append_shard(folder, pa.table({"a": [1]}))):
        with pytest.raises(TopworkError, match=r"file.facts: cannot be written: not a directory. Set TOPWORK_CACHE"):
            write(tmp_path / "file" / "facts")

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TopworkError, match=r"facts.*cannot be written: no space left on device.*TOPWORK_CACHE"):
        append_shard(tmp_path / "facts", pa.table({"a": [1]}))
    assert not list((tmp_path / "facts").iterdir())


def test_a_shard_that_fails_while_it_is_read_is_not_believed(tmp_path):
    path = append_shard(tmp_path, pa.table({"a": list(range(1000))}))
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(DAMAGE, match="CRC"):
        read_parquet(path)


def test_a_large_array_is_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(shards, "IN_MEMORY", 100)
    small, large = shards.room_for((5, 5), np.float32), shards.room_for((5, 6), np.float32)
    large[:] = np.arange(6)
    assert small.base is None
    assert isinstance(large.base, np.memmap)
    assert large.sum() == 75
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_large_array_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(shards, "IN_MEMORY", 100)
    monkeypatch.setattr(shards.os, "posix_fallocate", full)
    with pytest.raises(TopworkError, match=r"cannot be written: no space left on device\. Set TOPWORK_CACHE"):
        shards.room_for((5, 6), np.float32)
