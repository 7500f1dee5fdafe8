"""Chunks of rows: they fit the memory, run on several threads, fill waves, and change no result."""

import json
from pathlib import Path

import pytest
import torch
from helpers.layer_inputs import PATTERNS, D, assert_same, make_config, make_gram, make_layers, run
from helpers.pretended_gpu import pretended_gpu

from sparsefw.errors import InputError
from sparsefw.kernels.backend import TORCH
from sparsefw.solver import choices
from sparsefw.solver.choices import CHOOSE
from sparsefw.solver.chunks import BYTES_PER_ENTRY, ROW_UNIT, TILE, by_chunks, wave_rows


class TestChunks:
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("refit_steps", [0, 3])
    def test_chunks_and_threads_change_nothing(self, text, refit_steps, set_threads, monkeypatch):
        unit, sizes, choose = BYTES_PER_ENTRY * D * ROW_UNIT, [], choices.choose_frank_wolfe

        def spy(rows, *rest):
            sizes[-1].append(len(rows.W))
            assert torch.get_num_threads() == 1
            return choose(rows, *rest)

        monkeypatch.setitem(CHOOSE, "sparsefw", spy)
        results = []
        for threads in (1, 3):
            set_threads(threads)
            for memory in (1 << 40, 3 * unit - 1, unit):
                sizes.append([])
                config = make_config(text, refit=refit_steps, swaps=0 if refit_steps else 20)
                results.append(run(make_layers(), config=config, memory=memory))
                assert torch.get_num_threads() == threads
        # Rows are shared out over the threads, of which there are no more than the memory has room for.
        assert sizes == [[256], [128, 128], [64] * 4, [128, 128], [64] * 4, [64] * 4]
        for result in results[1:]:
            assert_same(results[0], result)

    def test_errors_of_threads_arrive(self, set_threads, monkeypatch):
        def fail(rows, *rest):
            raise FloatingPointError("no")

        set_threads(3)
        monkeypatch.setitem(CHOOSE, "sparsefw", fail)
        with pytest.raises(FloatingPointError, match="layer0, layer1, layer2, layer3: no"):
            run(make_layers())
        assert torch.get_num_threads() == 3

    def test_too_little_memory(self):
        with pytest.raises(InputError, match=r"layer0: a solve needs 0.000 GiB at least, and 0.000 are set aside"):
            run(make_layers(), memory=BYTES_PER_ENTRY * D * ROW_UNIT - 1)


def waves_by_hand(rows, d, height, multiprocessors, tile):
    """Waves of all chunks, tile by tile."""
    total = 0
    for start in range(0, rows, height):
        chunk = min(height, rows - start)
        tiles = [(i, j) for i in range(0, chunk, tile[0]) for j in range(0, d, tile[1])]
        total += len(range(0, len(tiles), multiprocessors))
    return total


class TestWaves:
    @pytest.mark.parametrize("rows", [64, 320, 1024, 2240])
    @pytest.mark.parametrize("d", [64, 520, 1024])
    @pytest.mark.parametrize("multiprocessors", [1, 7, 132])
    def test_no_other_height_takes_fewer_waves(self, rows, d, multiprocessors):
        for most in range(ROW_UNIT, rows + 2 * ROW_UNIT, 3 * ROW_UNIT):
            for tile in ((128, 256), (64, 64)):
                height = wave_rows(rows, d, most, multiprocessors, tile)
                highest = min(most, rows)
                allowed = [h for h in range(ROW_UNIT, highest + 1, ROW_UNIT) if 2 * h >= highest]
                cost = {h: (waves_by_hand(rows, d, h, multiprocessors, tile), -(-rows // h), h) for h in allowed}
                assert cost[height] == min(cost.values())

    @pytest.mark.parametrize(("rows", "d", "most", "height"), [
        # 33 x 32 tiles are 8 waves of 132.
        (8448, 8192, 6528, 4224),
        # Rows that fit are one chunk. Others are shared out evenly where that costs no wave.
        (6144, 4096, 13056, 6144),
        (10240, 8192, 6528, 5120),
    ])  # fmt: skip
    def test_chunks_of_an_h100(self, rows, d, most, height):
        assert wave_rows(rows, d, most, 132) == height

    def test_the_tile_is_that_of_the_kernel(self):
        compiled = Path(__file__).resolve().parents[2] / "bench" / "results" / "compiled.json"
        large = "BLOCK_M={} BLOCK_N={} ".format(*TILE)
        rows = [row for row in json.loads(compiled.read_text())["rows"] if row["name"] == "product bf16 8192x28672"]
        assert [row["config"].startswith(large) for row in rows] == [True]

    @pytest.mark.parametrize(("memory_rows", "lengths"), [
        (1 << 20, [4480]),
        # 35 x 4 tiles are two waves, however they are cut in two. So chunks are as few as possible, and alike.
        (4416, [2240, 2240]),
        (1536, [1536, 1536, 1408]),
    ])  # fmt: skip
    def test_chunks_on_a_gpu(self, memory_rows, lengths):
        with pretended_gpu():
            W = torch.zeros(4480, 1024, device="cuda")
            memory = memory_rows * 1024 * BYTES_PER_ENTRY
            chunks = list(by_chunks(lambda rows: len(W[rows]), W, memory, "layer0", TORCH))
        assert chunks == lengths

    def test_chunks_of_any_height_give_the_same_bytes_on_a_gpu(self):
        unit, results = BYTES_PER_ENTRY * D * ROW_UNIT, []
        for memory in (1 << 40, 3 * unit, unit):
            with pretended_gpu():
                layers = [(name, weight.to("cuda")) for name, weight in make_layers()]
                pruned, rows = run(layers, make_gram().to("cuda"), memory=memory)
                results.append(({name: weight.cpu() for name, weight in pruned.items()}, rows))
        for result in results[1:]:
            assert_same(results[0], result)
