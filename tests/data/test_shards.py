import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topwork.data.shards import read_parquet, read_shards


def test_folder_names_are_no_columns_and_missing_columns_are_named(tmp_path):
    folder = tmp_path / "lens=wide"
    folder.mkdir()
    path = folder / "shard-1.parquet"
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), path)
    assert read_parquet(path).column_names == ["a", "b"]
    assert read_parquet(path, ["b"]).to_pydict() == {"b": ["x", "y"]}
    with pytest.raises(KeyError, match="c"):
        read_parquet(path, ["a", "c"])
    (folder / "shard-2.parquet").write_bytes(b"damaged")
    assert [found.name for found, _ in read_shards(folder, ["a"])] == ["shard-1.parquet"]
