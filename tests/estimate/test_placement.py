"""A run is placed so that it fits its limits, and what costs least time is given up first."""

from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import first_is_fast

from sparsefw.errors import InputError
from sparsefw.estimate.live_bytes import LinearCount
from sparsefw.estimate.memory import GIB, disk_space, memory_needs
from sparsefw.estimate.placement import place
from sparsefw.estimate.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.model.activations import Placement
from sparsefw.model.layers import ResidualWrite, Role
from sparsefw.model.partial_forward import INPUT
from sparsefw.solver.config import PruneConfig


def llama(hidden, intermediate, depth):
    """The shape of a Llama in bf16, with 8 heads of keys of 128 entries."""
    one, two, vocabulary = Role(0, INPUT), Role(1, INPUT), 128256
    write = ResidualWrite(INPUT, None)
    layers = [("q", hidden, hidden, "q", one), ("k", 1024, hidden, "q", one), ("v", 1024, hidden, "q", one)]
    layers += [("o", hidden, hidden, "o", Role(0, INPUT, write, True))]
    layers += [("gate", intermediate, hidden, "gate", two), ("up", intermediate, hidden, "gate", two)]
    layers += [("down", hidden, intermediate, "down", Role(1, INPUT, write, True))]
    layers = tuple(LayerShape(*layer, role=role) for *layer, role in layers)
    size, outside = sum(layer.rows * layer.d for layer in layers) + 2 * hidden, 2 * vocabulary * hidden + hidden
    # As counted of Llama-3-70B.
    live, allocated = (LinearCount(0, 25 * hidden),), LinearCount(0, 83 * hidden)
    block = BlockShape(2 * size, layers, layers, live=live, allocated=allocated)
    blocks = *[block] * (depth - 1), replace(block, predicts=True)
    between = ((LinearCount(2), LinearCount(0, 1), LinearCount(hidden)),)
    return ModelShape(blocks, 2 * outside, hidden, vocabulary, 0, 2, 2, depth * size + outside, (2 * outside,), between)


def enough(what, shape, workload, limits, folder, text=""):
    """The GiB that a refusal says are enough; it names the limit, and has this text."""
    with refused(rf"{what}_memory=[\d.]+: this run needs at least [\d.]+ GiB of (GPU|host) memory{text}") as caught:
        place(shape, workload, limits, folder)
    return float(str(caught.value).split("at least ")[1].split()[0])


def work(gpu=True, windows=256, evaluation=(), seqlen=2048, ranks=1, **options):
    """The work of a run without a reconstruction, unless the options have one."""
    config = PruneConfig(**{"reconstruct": 0} | options).on(torch.device("cpu")).for_calibration(windows, seqlen, ranks)
    return Workload(-(-windows // ranks), evaluation, seqlen, config, gpu, ranks=ranks, ranks_here=ranks)


LLAMA_70B, LLAMA_405B = llama(8192, 28672, 80), llama(16384, 53248, 126)
ENDLESS = {"gpu": 10**18, "host": 10**18}


def test_goals():
    """The expected memory meets the goals; a GPU has to confirm it."""
    place(LLAMA_70B, work(), {"gpu": 16 * GIB, "host": 32 * GIB})
    place(LLAMA_405B, work(), {"gpu": 48 * GIB, "host": 64 * GIB})
    place(LLAMA_70B, work(reconstruct=2), {"gpu": 20 * GIB, "host": 64 * GIB})
    place(LLAMA_405B, work(reconstruct=2), {"gpu": 66 * GIB, "host": 96 * GIB})


@pytest.mark.parametrize(("windows", "step", "batch"), [(2, 1, 1), (256, 1, 16), (512, 2, 32), (10**5, 390, 780)])
def test_a_micro_batch_is_one_step_of_a_reconstruction_or_several(windows, step, batch):
    """There are 256 steps where there are windows for them, and 16 micro-batches, each of as many tokens as is fast.

    On a CPU, and where windows have more than hidden states, a micro-batch is a step.
    """

    def chosen(shape, gpu=True, passes=1):
        placement = place(shape, work(gpu, windows=windows, seqlen=16, reconstruct=passes), ENDLESS)
        return placement.batch, placement.step

    assert chosen(LLAMA_70B) == (batch, step if step < batch else 0)
    assert chosen(replace(LLAMA_70B, divisible=False)) == (step, 0)
    assert chosen(LLAMA_70B, gpu=False) == (min(step, 128), 0)
    assert (chosen(LLAMA_70B, passes=0), chosen(LLAMA_70B, False, 0)) == ((1024, 0), (128, 0))


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("options", first_is_fast([{"reconstruct": 2}, {}]))
def test_smallest_limit_that_is_named_is_enough(gpu, options, tmp_path):
    workload, remedy = work(gpu, **options), ".*or reconstruct=0$" if options else ""
    limits = {"gpu": GIB, "host": GIB} if gpu else {"host": GIB}
    for what in limits:
        needed = enough(what, LLAMA_70B, workload, limits, tmp_path, remedy)
        limits[what] = int((needed - 0.03) * GIB)
        assert enough(what, LLAMA_70B, workload, limits, tmp_path) == needed
        limits[what] = int(needed * GIB)
    assert place(LLAMA_70B, workload, limits, tmp_path).folder == tmp_path


def test_what_is_given_up_first(set_threads):
    """On a GPU activations move away first; on a CPU solves become smaller first, and windows go one by one last."""
    # Each has rows at work.
    set_threads(2)
    workload = work()
    places = [place(LLAMA_70B, workload, {"gpu": g * GIB, "host": h * GIB}) for g, h in ((100, 64), (24, 64), (24, 12))]
    assert [p.place for p in places] == ["gpu", "host", "file"]
    # Inputs are kept where there is room for them, and never in a file.
    assert [p.kept_width for p in places] == [28672, 28672, 0]
    # The number of windows goes first, down to what keeps a GPU busy.
    few = place(LLAMA_70B, work(), {"gpu": 18 * GIB, "host": 64 * GIB})
    assert ([p.batch for p in places], few) == ([8, 8, 8], replace(places[1], batch=4))
    # A reconstruction begins before the input of the last layers.
    again = place(LLAMA_70B, work(reconstruct=1), {"gpu": 100 * GIB, "host": 64 * GIB})
    assert (again.place, again.kept_width) == ("gpu", 8192)
    shape, workload = llama(3072, 8192, 28), work(gpu=False, windows=8, seqlen=128)
    roomy, tight = (place(shape, workload, {"host": int(g * GIB)}) for g in (16, 2.73))
    assert (roomy.batch, roomy.ahead, roomy.place, roomy.kept_width) == (16, True, "host", 8192)
    assert (tight.batch, tight.place) == (16, "host")
    assert tight.solver < roomy.solver
    with pytest.raises(InputError):
        place(shape, workload, {"host": GIB})


def test_what_is_settled_stays():
    workload, fixed = work(gpu=False, windows=8, seqlen=128), {"batch": 5, "solver": 1 << 30}
    placement = place(llama(1024, 4096, 2), workload, {"host": 64 * GIB}, fixed=fixed)
    assert (placement.batch, placement.solver) == (5, 1 << 30)


def test_nothing_grows_with_depth_but_the_disk():
    shallow, deep = (llama(1024, 4096, depth) for depth in (4, 80))
    for gpu in (True, False):
        assert memory_needs(shallow, work(gpu=gpu), Placement(2)) == memory_needs(deep, work(gpu=gpu), Placement(2))
    assert disk_space(deep, work(), Placement(2))["output"] == 2 * deep.parameters


def test_ranks_share_rows_and_the_memory_of_a_machine(tmp_path):
    shape = llama(1024, 4096, 2)

    def solve(ranks, **options):
        return memory_needs(shape, work(windows=400, ranks=ranks, **options), Placement(2, "host")).phases["solve"][0]

    assert solve(4, sparsity="2:4") < solve(1, sparsity="2:4")
    # One rank solves a problem that takes all rows together.
    assert solve(4, method="sparsegpt") == solve(1, method="sparsegpt")
    workload, limits = work(ranks=8), {"gpu": 64 * GIB, "host": GIB}
    needed = enough("host", LLAMA_70B, workload, limits, tmp_path, " for 8 ranks")
    place(LLAMA_70B, workload, limits | {"host": int(needed * GIB) // 8}, tmp_path)
