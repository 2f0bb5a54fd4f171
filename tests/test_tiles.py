"""The table that tiles are chosen from."""

import json
import subprocess
import sys
from pathlib import Path

import kernel_cases  # noqa: F401 - skips where there is no Triton
import pytest
import torch

from dynexec.kernels import measured_tiles
from dynexec.kernels.configs import Tile, choose_pair_tile, choose_tile

ROOT = Path(__file__).parents[1]
# Rows for the table's other parts.
PAIR = [
    {"device": "a GPU", "pair": [8, 10], "batch": 2, "keep": keep, "tile": [64, 64, 64, 4, 3, 3], "us": 1.0}
    for keep in (1.0, 0.5, 0.25)
]
GROUPED = [{"device": "a GPU", "grouped": [8, 8, 3, 1, 10], "batch": 2, "tile": [64, 64, 64, 4, 3, 4], "us": 1.0}]
in_the_source_tree = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree")


@pytest.fixture
def tiles(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import tiles

    return tiles


@in_the_source_tree
def test_the_table_is_what_was_measured(tiles, tmp_path):
    tiles.write_table(ROOT / "bench" / "tiles.jsonl", tmp_path / "table.py")
    written = {}
    exec((tmp_path / "table.py").read_text(), written)
    assert written["CONVOLUTIONS"] == measured_tiles.CONVOLUTIONS
    assert written["GROUPED"] == measured_tiles.GROUPED
    assert written["PAIRS"] == measured_tiles.PAIRS


@in_the_source_tree
def test_the_fastest_tile_is_written(tiles, tmp_path):
    """The least sum over the keep rates, of those that were measured at all of them and were right.

    One with weights copied in blocks must win more than 3 %.
    """
    fast, even, partly = [64, 64, 64, 4, 3, 4], [128, 64, 64, 4, 4, 2], [64, 32, 64, 4, 4, 4]
    times = {(1.0, 0): 8.0, (0.5, 0): 1.0, (0.25, 0): 1.0, (1.0, 1): 3.0, (0.5, 1): 3.0, (0.25, 1): 3.0, (1.0, 2): 0.1}
    rows = [
        f'{{"device": "a GPU", "layer": [8, 16, 3, 1, 10], "batch": 2, "keep": {keep}, "tile": {tile}, "us": {us}}}\n'
        for (keep, number), us in times.items()
        for tile in ((fast, even, partly)[number],)
    ]
    rows += [
        f'{{"device": "a GPU", "grouped": [8, 16, 3, 1, 10], "batch": {batch}, "tile": {tile}, "us": {us}}}\n'
        for batch, blocks in ((2, 0.98), (4, 0.96))
        for tile, us in ((fast, 1.0), (even, 2.0), (json.dumps([*fast, True]), blocks))
    ]
    rows += [json.dumps(row) + "\n" for row in PAIR]
    (tmp_path / "rows").write_text("".join(rows))
    tiles.write_table(tmp_path / "rows", tmp_path / "table.py")
    written = {}
    exec((tmp_path / "table.py").read_text(), written)
    assert written["CONVOLUTIONS"] == [(9, 200, 16, 8, tuple(even))]
    assert written["PAIRS"] == [(200, 8, (64, 64, 64, 4, 3, 3))]
    assert written["GROUPED"] == [(9, 200, 16, 8, tuple(fast)), (9, 400, 16, 8, (*fast, True))]


@in_the_source_tree
def test_the_last_measurement_counts(tiles, tmp_path):
    """Of a GPU; of several GPUs the one that comes last, if all of a tile was measured there."""

    def write(*rows):
        what = {"layer": [8, 16, 3, 1, 10], "batch": 2}
        lines = [
            {"device": device, **what, "keep": keep, "tile": [tile, 64, 64, 4, 4, 2], "us": us}
            for device, tile, us, keeps in rows
            for keep in keeps
        ]
        (tmp_path / "rows").write_text("".join(json.dumps(line) + "\n" for line in lines + PAIR + GROUPED))
        tiles.write_table(tmp_path / "rows", tmp_path / "table.py")
        written = {}
        exec((tmp_path / "table.py").read_text(), written)
        return written["CONVOLUTIONS"][0][-1][0]

    keeps = tiles.KEEPS
    assert write(("a", 64, 2.0, keeps), ("a", 128, 3.0, keeps)) == 64
    assert write(("a", 64, 2.0, keeps), ("a", 128, 3.0, keeps), ("a", 128, 1.0, keeps)) == 128
    assert write(("a", 64, 2.0, keeps), ("b", 128, 3.0, keeps)) == 128
    assert write(("a", 64, 2.0, keeps), ("b", 128, 3.0, keeps), ("a", 64, 2.0, keeps)) == 64
    assert write(("a", 64, 2.0, keeps), ("b", 128, 1.0, keeps[:1])) == 64
    assert write(("a", 64, 2.0, keeps), ("cpu", 128, 1.0, keeps)) == 64  # of --dry


@in_the_source_tree
@pytest.mark.parametrize("rows", [[], GROUPED, PAIR[:1] + GROUPED, [{**row, "device": "cpu"} for row in PAIR]])
def test_a_table_without_some_kind_is_not_written(rows, tiles, tmp_path, monkeypatch):
    table = tmp_path / "table.py"
    table.write_text("as it was")
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tiles, "TABLE", table)
    monkeypatch.setattr(sys, "argv", ["tiles.py", "--write", str(tmp_path / "rows")])
    with pytest.raises(SystemExit, match=r"nothing is written: .*rows: no tile .*: layer"):
        tiles.main()
    assert table.read_text() == "as it was"


def test_the_most_similar_layer_decides():
    row = next(row for row in measured_tiles.CONVOLUTIONS if row[:4] == (9, 25088, 256, 256))
    for pixels, channels, depth in ((25088, 256, 256), (25000, 250, 260)):
        assert choose_tile(pixels, channels, 9, depth, torch.float16, 90) == Tile(*row[4])
    grouped = measured_tiles.GROUPED[0]
    assert choose_tile(*grouped[1:3], 9, grouped[3], torch.float16, 90, grouped=True) == Tile(*grouped[4])
    small = choose_tile(64 * 64, 64, 9, 64, torch.float16, 90)  # of which no grouped one is like
    assert choose_tile(64 * 64, 64, 9, 64, torch.float16, 90, grouped=True) == small
    wide = choose_tile(25088, 256, 9, 256, torch.float32, 90)  # twice the bytes
    assert (wide.bn, wide.bk) == (row[4][1] // 2, row[4][2] // 2)
    assert choose_tile(25088, 256, 9, 20, torch.float16, 90).bk == 32  # there are no 64 channels
    pair = next(row for row in measured_tiles.PAIRS if row[1] == 128)
    assert choose_pair_tile(pair[0], 100, 128, torch.float16, 90) == Tile(*pair[2])


@in_the_source_tree
def test_a_tile_with_a_wrong_output_has_no_time(tiles, tmp_path):
    found, wanted, good = tiles.Tiles(tmp_path, dry=True), torch.ones(4), Tile(64, 64, 64, 4, 3, 4)
    found.seconds = lambda call: 1.0
    for value, failed in ((1.001, False), (1.1, True), (torch.nan, True)):
        found.path.unlink(missing_ok=True)
        found.race({"batch": 4}, lambda tile, value=value: torch.full((4,), value), [good], slice(None), wanted)
        row = json.loads(found.path.read_text())
        assert ("us" in row, "failed" in row, found.failed) == (not failed, failed, failed)


def test_large_tiles_are_for_gpus_with_the_memory_for_them():
    """As Hopper and the Blackwell of data centres, not that of workstations."""
    for dtype in (torch.float16, torch.float32):
        tiles = {number: choose_tile(25088, 256, 9, 256, dtype, number) for number in (86, 90, 100, 120)}
        pairs = {number: choose_pair_tile(25088, 256, 256, dtype, number) for number in (86, 90, 100, 120)}
        for found in (tiles, pairs):
            assert found[120] == found[86] != found[90] == found[100]


def test_copying_weights_in_blocks_is_measured_for_each_kernel():
    assert choose_tile(80 * 81, 256, 9, 256, torch.float16, 90).tma
    assert not choose_tile(80 * 81, 256, 9, 256, torch.float16, 90, grouped=True).tma


@in_the_source_tree
def test_measuring_to_its_end(tmp_path):
    command = [sys.executable, ROOT / "bench" / "tiles.py", tmp_path, "--dry"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "tiles.jsonl").read_text()
    assert text.count('"us"') > 20 and "failed" not in text
