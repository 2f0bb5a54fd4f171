"""The cost model against sums written out naively, with made-up costs."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynexec.executors import grouped
from dynexec.executors.choose import StageCosts
from dynexec.executors.costs import BlockCost, CostCache, Curve
from dynexec.route import Route


def test_curve_joins_and_extends_its_points():
    curve = Curve({1: 2.0, 4: 5.0, 8: 7.0})
    assert [curve(n) for n in (0, 1, 2, 4, 6, 8, 12)] == pytest.approx([0, 2, 3, 5, 6, 7, 9])
    assert Curve({4: 2.0})(6) == pytest.approx(3.0)
    assert Curve({"1": 1.0, "2": 1.5})(3) == pytest.approx(2.0)  # keys as JSON gives them


@pytest.fixture
def stage():
    """Three blocks, the first with a shortcut, and their costs."""
    shortcut, none = {1: 0.5, 8: 3.0}, {1: 0.0}
    costs = [
        BlockCost(8, {1: 2.0, 8: 9.0}, {1: 0.3, 8: 1.1}, {1: 0.2, 8: 1.0}, shortcut),
        BlockCost(8, {1: 1.5, 8: 8.0}, {1: 0.2, 8: 0.9}, {1: 0.1, 8: 0.8}, none),
        BlockCost(8, {1: 1.6, 8: 8.5}, {1: 0.2, 8: 0.9}, {1: 0.1, 8: 0.8}, none),
    ]
    blocks = [SimpleNamespace(column=column) for column in range(3)]
    return SimpleNamespace(blocks=blocks, costs=StageCosts(costs))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_predictions_are_sums_over_blocks(stage, n, keep):
    decisions = torch.rand(n, 3) < keep
    parts = grouped.prepare(stage, Route.from_decisions(decisions))
    kept = decisions.sum(0).tolist()
    seconds = stage.costs.predict(kept, parts, n)

    compact = masked = 0.0
    for block, count in zip(stage.costs.blocks, kept, strict=True):
        compact += block.shortcut(n) + block.body(count) + (block.move(count) if count < n else 0)
        masked += block.shortcut(n) + block.body(n) + (block.select(n) if count < n else 0)
    groups = 0.0
    patterns, sizes = decisions.unique(dim=0, return_counts=True)
    for pattern, size in zip(patterns.tolist(), sizes.tolist(), strict=True):
        groups += stage.costs.blocks[0].move(size) if len(sizes) > 1 else 0
        groups += sum(block.shortcut(size) for block in stage.costs.blocks)
        groups += sum(block.body(size) for block, keep in zip(stage.costs.blocks, pattern, strict=True) if keep)
    assert seconds == pytest.approx({"compact": compact, "masked": masked, "grouped": groups})

    dense = sum(
        block.shortcut(n) + block.body(n) * count / n for block, count in zip(stage.costs.blocks, kept, strict=True)
    )
    for executor, total in seconds.items():
        losses = stage.costs.losses(executor, kept, parts, n)
        assert dense + sum(losses.values()) == pytest.approx(total), executor


def test_cache_keeps_what_others_wrote(tmp_path):
    path = tmp_path / "deep" / "costs.json"
    first, second = CostCache(path), CostCache(path)
    first.get("a", bool, lambda: {"chunk": 1})
    second.get("b", bool, lambda: {"chunk": 2})
    first.save()
    second.save()
    assert set(CostCache(path).entries) == {"a", "b"}
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_cache_in_a_place_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "costs.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for cache, warns in ((CostCache(), False), (CostCache(path), True)):
        caplog.clear()  # of what reading said
        assert cache.get("a", bool, lambda: {"chunk": 1}) == {"chunk": 1}
        cache.save()
        assert [str(path) in text for text in caplog.messages] == [True] * warns
    for path in (3, b"costs.json"):
        with pytest.raises(TypeError, match="cost_cache must be a path or None, got"):
            CostCache(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_cache_that_is_no_file(tmp_path, caplog):
    """A pipe, of which reading would wait for ever, and names that no file has."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", f"{tmp_path}/a\0b", tmp_path / ("a" * 300)):
        caplog.clear()
        cache = CostCache(path)
        assert cache.get("a", bool, lambda: {"chunk": 1}) == {"chunk": 1}
        cache.save()
        read, written = caplog.messages
        assert "is ignored: " in read and "cannot be written: " in written
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_a_user_without_a_home(tmp_path, monkeypatch):
    """As in a container under a number that no user has."""

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    cache = CostCache()
    assert cache.get("a", bool, lambda: {"chunk": 1}) == {"chunk": 1}
    cache.save()
    assert CostCache().entries == {} and CostCache(tmp_path / "costs.json").path == tmp_path / "costs.json"


def test_key_changes_with_threads():
    cache = CostCache("unused")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cache.key("block")
        torch.set_num_threads(2)
        assert cache.key("block") != one
    finally:
        torch.set_num_threads(threads)
