"""Chunks of rows: they fit the memory, run on several threads, and change no result."""

import pytest
import torch
from helpers.layer_inputs import PATTERNS, D, assert_same, make_config, make_layers, run

from sparsefw.errors import InputError
from sparsefw.solver import choices
from sparsefw.solver.choices import CHOOSE
from sparsefw.solver.chunks import BYTES_PER_ENTRY, ROW_UNIT


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
