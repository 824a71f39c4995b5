"""Splits: no group straddles, shares are kept, the seed decides, and the layout does not matter."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topwork.data.manifest import Manifest, exact_duplicates
from topwork.data.samples import Sample
from topwork.data.split import divided_as, join_groups, split, split_record
from topwork.errors import UsageError
from topwork.text import natural_key


def manifest(rows: list[tuple[int, str, str | None, str | None]]) -> Manifest:
    """Rows of (content, label, group, part)."""
    samples = tuple(
        Sample(
            f"{n}.jpg", label, part, group, None, hashlib.sha256(b"%d" % content).hexdigest(), 9, "JPEG", "RGB", 8, 8, 1
        )
        for n, (content, label, group, part) in enumerate(rows)
    )
    return Manifest(Path("x"), "folders", samples, tuple(sorted({s.label for s in samples}, key=natural_key)), ())


rows_of_samples = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from("abc"), st.sampled_from([None, "p", "q", "r"]), st.none()),
    min_size=1,
    max_size=60,
)
pairs_of_rows = st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=6)


@given(rows_of_samples, pairs_of_rows, st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 9))
def test_a_split_is_a_partition_and_no_group_straddles(rows, pairs, valid, test, seed) -> None:
    data = manifest(rows)
    pairs = [(a, b) for a, b in pairs if max(a, b) < len(rows)]
    groups = join_groups(data, pairs)
    parts = split(data, valid, test, seed, groups)
    every = sorted([*parts.train.tolist(), *parts.valid.tolist(), *parts.test.tolist()])
    assert every == list(range(len(rows)))
    part_of = {row: name for name, some in parts.parts().items() for row in some.tolist()}
    parts_of_group: dict[int, set[str]] = {}
    for row, group in enumerate(groups):
        parts_of_group.setdefault(group, set()).add(part_of[row])
    assert all(len(names) == 1 for names in parts_of_group.values())
    for a, b in pairs:
        assert groups[a] == groups[b]


@given(rows_of_samples, st.integers(0, 5), st.randoms())
def test_order_and_names_do_not_matter(rows, seed, rng) -> None:
    shuffled = list(rows)
    rng.shuffle(shuffled)
    one, other = manifest(rows), manifest(shuffled)

    def content(data: Manifest) -> dict[str, Counter[str]]:
        parts = split(data, seed=seed).parts()
        return {name: Counter(data.samples[row].content_hash for row in some.tolist()) for name, some in parts.items()}

    assert content(one) == content(other)


@given(
    st.lists(st.integers(5, 40), min_size=1, max_size=5), st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.integers(0, 9)
)
def test_each_class_gives_its_share(sizes, valid, test, seed) -> None:
    data = manifest([(100 * c + n, f"c{c}", None, None) for c, size in enumerate(sizes) for n in range(size)])
    parts = split(data, valid, test, seed)
    for number, size in enumerate(sizes):
        for share, rows in ((valid, parts.valid), (test, parts.test)):
            found = sum(data.samples[row].label == f"c{number}" for row in rows.tolist())
            assert abs(found - share * size) <= 1
        assert any(data.samples[row].label == f"c{number}" for row in parts.train.tolist())


def test_the_seed_decides() -> None:
    data = manifest([(n, "ab"[n % 2], None, None) for n in range(100)])
    digests = [split_record(split(data, seed=seed), data)["digest"] for seed in (0, 0, 1, 2)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_small_classes_get_their_share_on_average() -> None:
    data = manifest([(10 * c + n, f"c{c}", None, None) for c in range(400) for n in range(2)])
    parts = split(data, 0.2, 0.2)
    # Each of the other parts gets an image with probability 0.4, but one stays: 2 - 0.4 - 0.4 + 0.4 * 0.4 a class.
    assert len(parts.train) == pytest.approx(400 * 1.36, abs=40)
    assert {data.samples[row].label for row in parts.train.tolist()} == set(data.classes)


def test_given_parts_are_kept_and_leaks_found() -> None:
    rows = [(0, "a", None, "train"), (1, "b", None, "train"), (0, "a", None, "test"), (2, "b", "p", "valid"),
            (3, "b", "p", "train"), (4, "a", None, None), (5, "a", None, "test")]  # fmt: skip
    data = manifest(rows)
    parts = split(data)
    assert parts.given
    assert [sorted(some.tolist()) for some in (parts.train, parts.valid, parts.test)] == [[0, 1, 4, 5], [3], [2, 6]]
    assert set(parts.leaks) == {(2, 0), (3, 4)}
    record = split_record(parts, data)
    assert ["2.jpg", "0.jpg"] in record["leaks"]
    near = split(data, groups=join_groups(data, [(6, 1)]))
    assert (6, 1) in near.leaks


def test_wrong_shares_and_no_training_images_are_wrong_use() -> None:
    data = manifest([(n, "a", None, None) for n in range(4)])
    for valid, test in ((0.5, 0.5), (-0.1, 0.2), (1.0, 0.0)):
        with pytest.raises(UsageError, match="must be at least 0"):
            split(data, valid, test)
    with pytest.raises(UsageError, match="no training images"):
        split(manifest([(0, "a", None, "test")]))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 9))
def test_a_lone_train_part_is_divided_unless_the_test_fraction_is_zero(sizes, valid, test, seed) -> None:
    labels = [str(label) for label, size in enumerate(sizes) for _ in range(size)]
    bare, in_train = (manifest([(n, label, None, part) for n, label in enumerate(labels)]) for part in (None, "train"))
    assert in_train.is_train_only
    parts = split(in_train, valid, test, seed)
    if test == 0:
        assert parts.given
        assert len(parts.train) == len(labels)
    else:
        assert not parts.given
        assert parts.train.tolist() == split(bare, valid, test, seed).train.tolist()
    assert {in_train.samples[row].label for row in parts.train} == set(in_train.classes)


def test_groups_join_through_content_names_and_pairs() -> None:
    data = manifest(
        [(0, "a", None, None), (0, "b", "p", None), (1, "a", "p", None), (2, "a", None, None), (3, "a", "q", None)]
    )
    a, b, c, d, e = join_groups(data)
    assert a == b == c
    assert sorted({a, d, e}) == [0, 1, 2]
    assert join_groups(data, [(3, 4), (4, 2)]) == [0, 0, 0, 0, 0]
    assert exact_duplicates(data.samples) == [[0, 1]]


def test_several_labels_are_spread_by_the_rarest() -> None:
    # Every combination is there once, so by combinations nothing could be drawn.
    rows = [(n, f"common|only {n}" + ("" if n % 4 else "|rare"), None, None) for n in range(80)]
    names = ("common", "rare", *(f"only {n}" for n in range(80)))
    data = Manifest(Path("x"), "table", manifest(rows).samples, names, (), multi_label=True)
    parts = split(data, 0.25, 0.25)
    for some in (parts.valid, parts.test):
        assert 3 <= sum("rare" in data.samples[row].label for row in some.tolist()) <= 7


def test_a_split_can_be_another_run_s() -> None:
    first = manifest([(n, "ab"[n % 2], None, None) for n in range(40)])
    record = split_record(split(first, 0.25, 0.25, seed=3), first)
    # a label has changed, one image is gone, two are new
    later = manifest([(n, "b" if n == 0 else "ab"[n % 2], None, None) for n in range(42) if n != 7])
    chosen = split(divided_as(later, record), 0.1, 0.1, seed=9)
    hashes = {name: {later.samples[row].content_hash for row in rows} for name, rows in chosen.parts().items()}
    gone = first.samples[7].content_hash
    for name in ("valid", "test"):
        assert hashes[name] == {item["content_hash"] for item in record["parts"][name]} - {gone}
    assert {later.samples[-1].content_hash, later.samples[-2].content_hash} <= hashes["train"]
    with pytest.raises(UsageError, match="none of these is in it"):
        divided_as(manifest([(n, "a", None, None) for n in range(100, 110)]), record)
