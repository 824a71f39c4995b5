"""The cache is shown and emptied, and nothing that is not ours is touched."""

from topwork.commands.cache import cache_contents, clear_cache


def test_only_what_topwork_keeps_there_is_counted_and_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    (tmp_path / "features" / "abc").mkdir(parents=True)
    (tmp_path / "features" / "abc" / "shard.parquet").write_bytes(b"x" * 1000)
    (tmp_path / "facts-2").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    assert cache_contents()["bytes"] == {"facts-2": 0, "features": 1000}
    assert clear_cache()["freed"] == 1000
    assert cache_contents()["bytes"] == {}
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "mine"
    assert (tmp_path / "notes.txt").exists()


def test_a_cache_that_does_not_exist_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "none"))
    assert cache_contents()["bytes"] == {}
    assert clear_cache()["freed"] == 0
