"""A run is placed so that it fits its limits, and what costs least time is given up first."""

from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import first_is_fast
from transformers import LlamaConfig

from sparsefw.errors import InputError
from sparsefw.estimate.memory import GIB, disk_space, memory_needs
from sparsefw.estimate.placement import place
from sparsefw.estimate.plan import describe
from sparsefw.estimate.workload import Workload
from sparsefw.model.activations import Placement
from sparsefw.solver.config import PruneConfig


def llama(hidden, intermediate, depth):
    """The shape of a Llama in bf16, with 8 heads of keys of 128 entries."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return describe(folder).shape


def enough(what, shape, workload, limits, folder, text=""):
    """The GiB that a refusal says are enough; it names the limit, and has this text."""
    with refused(rf"{what}_memory=[\d.]+: this run needs at least [\d.]+ GiB of (GPU|host) memory{text}") as caught:
        place(shape, workload, limits, folder)
    return float(str(caught.value).split("at least ")[1].split()[0])


def work(gpu=True, windows=256, evaluation=(), seqlen=2048, ranks=1, **options):
    """The work of a run without a reconstruction, unless the options have one."""
    config = PruneConfig(**{"reconstruct": 0} | options).on(torch.device("cpu")).for_calibration(windows, seqlen, ranks)
    return Workload(-(-windows // ranks), evaluation, seqlen, config, gpu, ranks=ranks, ranks_here=ranks)


@pytest.fixture(scope="module")
def llama_70b():
    return llama(8192, 28672, 80)


ENDLESS = {"gpu": 10**18, "host": 10**18}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "alone", "fitted"),
    [((8192, 28672, 80), (16, 32), (20, 64)), ((16384, 53248, 126), (48, 64), (66, 96))],
)
def test_goals(sizes, alone, fitted):
    """The expected memory, without and with a reconstruction, meets the goals; a GPU has to confirm it."""
    shape = llama(*sizes)
    for passes, (gpu, host) in ((0, alone), (2, fitted)):
        place(shape, work(reconstruct=passes), {"gpu": gpu * GIB, "host": host * GIB})


@pytest.mark.parametrize(("windows", "step", "batch"), [(2, 1, 1), (256, 1, 16), (512, 2, 32), (10**5, 390, 780)])
def test_a_micro_batch_is_one_step_of_a_reconstruction_or_several(llama_70b, windows, step, batch):
    """There are 256 steps where there are windows for them, and 16 micro-batches, each of as many tokens as is fast.

    On a CPU, and where windows have more than hidden states, a micro-batch is a step.
    """

    def chosen(shape, gpu=True, passes=1):
        placement = place(shape, work(gpu, windows=windows, seqlen=16, reconstruct=passes), ENDLESS)
        return placement.batch, placement.step

    assert chosen(llama_70b) == (batch, step if step < batch else 0)
    assert chosen(replace(llama_70b, divisible=False)) == (step, 0)
    assert chosen(llama_70b, gpu=False) == (min(step, 128), 0)
    assert (chosen(llama_70b, passes=0), chosen(llama_70b, False, 0)) == ((1024, 0), (128, 0))


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("options", first_is_fast([{"reconstruct": 2}, {}]))
def test_smallest_limit_that_is_named_is_enough(llama_70b, gpu, options, tmp_path):
    workload, remedy = work(gpu, **options), ".*or reconstruct=0$" if options else ""
    limits = {"gpu": GIB, "host": GIB} if gpu else {"host": GIB}
    for what in limits:
        needed = enough(what, llama_70b, workload, limits, tmp_path, remedy)
        limits[what] = int((needed - 0.03) * GIB)
        assert enough(what, llama_70b, workload, limits, tmp_path) == needed
        limits[what] = int(needed * GIB)
    assert place(llama_70b, workload, limits, tmp_path).folder == tmp_path


def test_what_is_given_up_first(llama_70b, set_threads):
    """On a GPU activations move away first; on a CPU solves become smaller first, and windows go one by one last."""
    # Each has rows at work.
    set_threads(2)
    workload = work()
    places = [place(llama_70b, workload, {"gpu": g * GIB, "host": h * GIB}) for g, h in ((100, 64), (24, 64), (24, 12))]
    assert [p.place for p in places] == ["gpu", "host", "file"]
    # Inputs are kept where there is room for them, and never in a file.
    assert [p.kept_width for p in places] == [28672, 28672, 0]
    # The number of windows goes first, down to what keeps a GPU busy.
    few = place(llama_70b, work(), {"gpu": 18 * GIB, "host": 64 * GIB})
    assert ([p.batch for p in places], few) == ([8, 8, 8], replace(places[1], batch=4))
    # A reconstruction begins before the input of the last layers.
    again = place(llama_70b, work(reconstruct=1), {"gpu": 100 * GIB, "host": 64 * GIB})
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


def test_ranks_share_rows_and_the_memory_of_a_machine(llama_70b, tmp_path):
    shape = llama(1024, 4096, 2)

    def solve(ranks, **options):
        return memory_needs(shape, work(windows=400, ranks=ranks, **options), Placement(2, "host")).phases["solve"][0]

    assert solve(4, sparsity="2:4") < solve(1, sparsity="2:4")
    # One rank solves a problem that takes all rows together.
    assert solve(4, method="sparsegpt") == solve(1, method="sparsegpt")
    workload, limits = work(ranks=8), {"gpu": 64 * GIB, "host": GIB}
    needed = enough("host", llama_70b, workload, limits, tmp_path, " for 8 ranks")
    place(llama_70b, workload, limits | {"host": int(needed * GIB) // 8}, tmp_path)
