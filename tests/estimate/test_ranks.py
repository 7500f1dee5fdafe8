"""What is estimated of several ranks: each has its share of windows, rows and experts, and of a machine's memory."""

from dataclasses import replace

import pytest
from estimate.test_memory import LLAMA_70B, llama, work
from helpers.checkpoints import refused

from sparsefw.estimate.memory import GIB, activation_bytes, disk_space, memory_needs
from sparsefw.estimate.placing import place
from sparsefw.estimate.sharing import solves_of_rank
from sparsefw.estimate.workload import Workload
from sparsefw.model import Placement
from sparsefw.model.shapes import BlockShape, LayerShape
from sparsefw.solver import PruneConfig

PHASES = ("start", "calibrate", "solve", "write", "end")


def quartered(shape):
    """The same model, of whose layers a quarter of the rows is solved."""
    blocks = tuple(
        replace(block, layers=tuple(replace(x, rows=x.rows // 4) for x in block.layers), all_layers=block.layers)
        for block in shape.blocks
    )
    return replace(shape, blocks=blocks)


@pytest.mark.parametrize(
    ("windows", "ranks", "passes"), [(127, 1, 2), (128, 1, 1), (254, 2, 2), (255, 2, 1), (256, 2, 1), (256, 4, 2)]
)
def test_passes_go_by_the_most_windows_of_a_rank(windows, ranks, passes):
    for given, expected in (({}, passes), ({"reconstruct": 3}, 3)):
        workload = Workload(windows, (), 2048, PruneConfig(**given), True, 1, ranks=ranks)
        assert workload.config.reconstruct == expected


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("place", ["gpu", "host"])
def test_a_rank_takes_what_its_share_takes(gpu, place):
    shape, placement = llama(1024, 4096, 2), Placement(2, place if gpu else "host")
    four = memory_needs(shape, replace(work(gpu, 14, (7,), method="wanda"), ranks=4), placement)
    alone = memory_needs(quartered(shape), work(gpu, 4, (2,), method="wanda"), placement)
    assert [four.phases[phase] for phase in PHASES] == [alone.phases[phase] for phase in PHASES]
    whole = memory_needs(shape, work(gpu, 14, (7,), method="wanda"), placement)
    assert sum(four.phases["solve"]) < sum(whole.phases["solve"])


@pytest.mark.parametrize("options", [{"method": "sparsegpt"}, {"sparsity": "layer:0.5"}, {"warm_start": "ria"}])
def test_whole_matrices_are_not_shared(options):
    def solve(n, **options):
        workload = replace(work(windows=400, **options), ranks=n)
        return memory_needs(llama(1024, 4096, 2), workload, Placement(2, "host")).phases["solve"][0]

    assert solve(4, **options) == solve(1, **options)
    assert solve(4, sparsity="2:4") < solve(1, sparsity="2:4")


def test_experts_of_a_rank():
    """All Gram matrices are there until they are summed, then those of five of sixteen experts."""
    layers = (LayerShape("up", 8192, 512, "up", 16),)
    shape = replace(llama(512, 8192, 2), blocks=(BlockShape(10**6, layers),) * 2)
    workload = work(method="wanda", windows=400, seqlen=64)
    one, three = (memory_needs(shape, replace(workload, ranks=n), Placement(2, "host")).phases for n in (1, 3))
    assert one["solve"][0] - three["solve"][0] == pytest.approx(1.05 * 4 * 10 * 512**2, rel=0.01)
    assert one["calibrate"][0] == three["calibrate"][0]


def test_the_rank_that_has_most_to_do_counts():
    """The dearest matrix goes to rank 0, and both others, which are more work together, to rank 1."""
    group = tuple((LayerShape(name, rows, 64, name),) for name, rows in (("a", 500), ("b", 400), ("c", 300)))
    config = PruneConfig(method="sparsegpt", kernel="torch", precision="ieee", reconstruct=0)
    assert [solve.layers[0].name for solve in solves_of_rank(group, "sparsegpt", config, 2)] == ["b", "c"]
    assert [solve.layers[0].name for solve in solves_of_rank(group, "sparsegpt", config, 1)] == ["a", "b", "c"]


def test_sums_need_room_for_panels():
    """Where a solve takes less than they do: of 512 experts with few rows, a rank keeps few Gram matrices."""
    d = 1024
    shape = replace(llama(d, d, 2), blocks=(BlockShape(10**6, (LayerShape("up", 64, d, "up", 512),)),) * 2)
    workload = replace(work(method="wanda", windows=4, seqlen=64), ranks=4)
    solve, _ = memory_needs(shape, workload, Placement(2, "host")).phases["solve"]
    moving = memory_needs(shape, workload, Placement(2, "host")).phases["write"][0]
    assert solve - moving == pytest.approx(1.05 * (4 * 512 * d * d + 2 * 4 * d * d // 16), abs=2)


def test_activations_of_ranks_in_files():
    shape, workload = llama(1024, 4096, 2), replace(work(refit=0, windows=10), ranks=4)
    window = 2048 * 1024 * 2
    assert activation_bytes(shape, workload) == 3 * window
    assert disk_space(shape, workload, Placement(2, "file"))["activations"] == 10 * window


def test_ranks_share_the_memory_of_a_machine(tmp_path):
    workload = replace(work(), ranks=16, machines=2)
    with refused(r"--host-memory 8.00: this run needs at least [\d.]+ GiB of host memory for 8 ranks") as caught:
        place(LLAMA_70B, workload, {"gpu": 64 * GIB, "host": GIB}, tmp_path)
    enough = float(str(caught.value).split("at least ")[1].split()[0])
    place(LLAMA_70B, workload, {"gpu": 64 * GIB, "host": int(enough * GIB) // 8}, tmp_path)
    with refused("--host-memory"):
        place(LLAMA_70B, workload, {"gpu": 64 * GIB, "host": int((enough - 0.1) * GIB) // 8}, tmp_path)
