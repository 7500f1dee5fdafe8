"""The expected memory is what a run takes, and a run keeps to its limits."""

from dataclasses import replace

import pytest
from helpers.checkpoints import refused
from helpers.families import save_model

from sparsefw import checkpoint
from sparsefw.errors import InputError
from sparsefw.estimate.memory import GIB, activation_bytes, memory_needs
from sparsefw.estimate.passes import stages
from sparsefw.estimate.placing import place
from sparsefw.estimate.workload import Workload
from sparsefw.model.layers import Role
from sparsefw.model.placement import Placement
from sparsefw.model.shape_of import shape_of
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.solver import PruneConfig


def llama(hidden, intermediate, depth, pairs=8, vocabulary=128256):
    """The shape of a Llama in bf16, with heads of 128 entries."""
    inputs = {
        "q": Role(0, "reads"),
        "o": Role(0, "writes", True),
        "gate": Role(1, "reads"),
        "down": Role(1, "writes", True),
    }
    layers = [("q", hidden, hidden, "q"), ("k", pairs * 128, hidden, "q"), ("v", pairs * 128, hidden, "q")]
    layers += [("o", hidden, hidden, "o"), ("gate", intermediate, hidden, "gate"), ("up", intermediate, hidden, "gate")]
    layers.append(("down", hidden, intermediate, "down"))
    layers = tuple(LayerShape(*layer, role=inputs[layer[-1]]) for layer in layers)
    size = sum(layer.rows * layer.d for layer in layers) + 2 * hidden
    outside = 2 * vocabulary * hidden + hidden
    return ModelShape(
        (BlockShape(2 * size, layers),) * depth, 2 * outside, hidden, vocabulary, 0, 2, depth * size + outside
    )


def work(gpu=True, windows=256, evaluation=(), seqlen=2048, threads=2, **options):
    """The work of a run without a reconstruction, unless the options have one."""
    return Workload(windows, evaluation, seqlen, PruneConfig(**{"reconstruct": 0} | options), gpu, threads)


LLAMA_70B, LLAMA_405B = llama(8192, 28672, 80), llama(16384, 53248, 126)


def test_goals():
    """The expected memory meets the goals; a GPU has to confirm it."""
    place(LLAMA_70B, work(), {"gpu": 16 * GIB, "host": 32 * GIB})
    place(LLAMA_405B, work(), {"gpu": 48 * GIB, "host": 64 * GIB})
    # Cards of 24 GB and of 80 GB have so much free, less a tenth.
    place(LLAMA_70B, work(reconstruct=2), {"gpu": 20 * GIB, "host": 64 * GIB})
    place(LLAMA_405B, work(reconstruct=2), {"gpu": 66 * GIB, "host": 96 * GIB})


@pytest.mark.parametrize(("windows", "batch"), [(2, 1), (64, 1), (256, 1), (511, 1), (512, 2), (2048, 8), (10**5, 256)])
def test_every_micro_batch_is_a_step_of_a_reconstruction(windows, batch):
    """There are 256 of them where there are windows for them; without a reconstruction they are as large as is fast."""
    endless = {"gpu": 10**18, "host": 10**18}
    for passes, expected in ((1, batch), (0, 256)):
        placement, _ = place(LLAMA_70B, work(windows=windows, seqlen=16, reconstruct=passes), endless)
        assert placement.batch == expected


@pytest.mark.parametrize("passes", [0, 2])
def test_a_refusal_names_the_reconstruction_where_there_is_one(passes):
    with pytest.raises(InputError, match=r"fewer or shorter windows \(--nsamples, --seqlen\)") as refused:
        place(LLAMA_70B, work(reconstruct=passes), {"gpu": 4 * GIB, "host": 64 * GIB})
    assert str(refused.value).endswith("or --reconstruct 0") == bool(passes)


def test_nothing_grows_with_depth():
    for gpu in (True, False):
        shallow, deep = (memory_needs(llama(1024, 4096, depth), work(gpu=gpu), Placement(2)) for depth in (4, 80))
        assert shallow == deep


@pytest.mark.parametrize(("depth", "beside"), [(1, 0), (2, 1), (3, 2), (4, 2)])
def test_blocks_beside_the_one_at_work(depth, beside):
    """One block is being read and one written, if there are so many."""
    shape, workload = llama(1024, 4096, depth, vocabulary=16), work(gpu=False)
    alone = memory_needs(llama(1024, 4096, 1, vocabulary=16), workload, Placement(2)).phases["solve"][1]
    blocks = (memory_needs(shape, workload, Placement(2)).phases["solve"][1] - alone) / shape.blocks[0].nbytes
    assert blocks == pytest.approx(1.05 * beside, abs=1e-3)


class TestPageLockedMemory:
    """On a GPU's host torch takes a power of two for every page-locked tensor, and keeps it."""

    def host(self, shape, placement, phase, **options):
        """Bytes on the host in a phase, without those of the process and the slack."""
        workload = work(**options)
        return (memory_needs(shape, workload, placement).phases[phase][1] - workload.process) / 1.05

    @pytest.mark.parametrize("ahead", [True, False])
    @pytest.mark.parametrize("hidden", [1024, 768])
    def test_the_next_block_is_page_locked_and_the_last_one_is_not(self, hidden, ahead):
        # With 1024, all sizes are powers of two. 768 x 768 takes the memory of 1024 x 1024, and 512 x 768 that of
        # 512 x 1024.
        block = 2 * (5 * hidden**2 + 2 * 512 * hidden + 2 * hidden)
        locked = 2 * (5 * 1024**2 + 2 * 512 * 1024 + 2 * hidden)
        shape = llama(hidden, hidden, 4, pairs=4, vocabulary=16)
        got = self.host(shape, Placement(2, ahead=ahead), "solve")
        # Without reading ahead the memory is given back before a block is written.
        assert got == pytest.approx(locked + block if ahead else max(locked, block), rel=1e-5)

    @pytest.mark.parametrize(("vocabulary", "taken"), [(65536, 65536), (40000, 65536)])
    def test_embeddings_and_head(self, vocabulary, taken):
        shape = llama(1024, 1024, 4, vocabulary=vocabulary)
        assert self.host(shape, Placement(2), "start") == pytest.approx(2 * 2 * 1024 * taken + 2 * 1024, rel=1e-5)

    @pytest.mark.parametrize(("hidden", "batch"), [(1024, 4096), (768, 4096), (1024, 3 * 2048)])
    def test_activations(self, hidden, batch):
        """7 windows in micro-batches of 2 or 3: the last one has one window."""
        shape, one = llama(hidden, 1024, 4, vocabulary=16), Placement(batch // 2048, "host")
        full, window = (2**24 if batch > 4096 else 2**23), 2**22
        near = self.host(shape, replace(one, place="gpu"), "solve", windows=7)
        # In the dense model, and in the pruned one.
        expected = 2 * (7 // one.batch * full + window)
        assert self.host(shape, one, "solve", windows=7) - near == pytest.approx(expected, rel=1e-5)


def test_experts_that_are_multiplied_at_once():
    """Every token has an input and an output for each of them, though one expert of eight is pruned."""
    up, down = LayerShape("up", 64, 32, "up", 8), LayerShape("down", 32, 64, "down", 8)
    one = replace(llama(32, 64, 2), blocks=(BlockShape(10**6, (up, down)),) * 2)
    layers = tuple(replace(layer, parts=8) for layer in (up, down))
    few = tuple(replace(layer, experts=1) for layer in layers)
    every, pruned = (replace(one, blocks=(BlockShape(10**6, some, layers),) * 2) for some in (layers, few))
    workload = work(method="wanda", windows=4, seqlen=64)
    calibrate = [memory_needs(shape, workload, Placement(2)).phases["calibrate"][0] for shape in (one, every, pruned)]
    # Inputs of both stages, and three times the widest output, for each token in two bytes.
    more = 1.05 * 2 * 128 * 7 * (32 + 64 + 3 * 64)
    assert calibrate[1] - calibrate[0] == pytest.approx(more, abs=2)
    grams = 1.05 * 4 * 7 * (32**2 + 64**2)
    assert calibrate[1] - calibrate[2] == pytest.approx(grams, abs=2)


@pytest.mark.parametrize(
    ("itemsize", "gpu", "windows", "few", "more"),
    [
        # Two layers of experts that are sent up to 64 tokens, "o" and the head. Without experts they are the same four.
        (2, False, 1, 2 * 64 + 2 - 4, 0),
        # 5 windows are 320 tokens: 64 numbers are more than a few.
        (2, False, 5, 2 * 256, 2 * 64 + 2 - 4),
        # 64 windows in one micro-batch, and 35 in the last one.
        (2, False, 99, 0, 1024 - 2 * 4),
        (4, False, 9, 0, 0),
        (2, True, 9, 0, 0),
    ],
)
def test_products_of_experts_in_half_precision(itemsize, gpu, windows, few, more):
    """oneDNN keeps code for every number of tokens, up to a maximum: experts get any number, others micro-batches."""
    layers = (LayerShape("up", 64, 32, "up", 8), LayerShape("down", 32, 64, "down", 8), LayerShape("o", 32, 32, "o"))
    shape = replace(llama(32, 64, 2), blocks=(BlockShape(10**6, layers),) * 2, itemsize=itemsize)
    dense = replace(shape, blocks=(BlockShape(10**6, tuple(replace(layer, experts=0) for layer in layers)),) * 2)
    process = [
        memory_needs(one, work(method="wanda", windows=windows, seqlen=64, gpu=gpu), Placement(64)).phases["write"][1]
        for one in (shape, dense)
    ]
    assert process[0] - process[1] == few * 640 * 1024 + more * 1280 * 1024


def test_stages_of_a_block():
    assert [[layer.name for layer in stage] for stage in stages(LLAMA_70B.blocks[0].layers)] == [
        ["q", "k", "v"],
        ["o"],
        ["gate", "up"],
        ["down"],
    ]


def test_activations_of_every_method():
    shape = llama(1024, 4096, 2)
    window = 2048 * 1024 * 2
    assert activation_bytes(shape, work(refit=0, windows=3)) == 3 * window
    assert activation_bytes(shape, work(windows=3)) == 2 * 3 * window
    assert activation_bytes(shape, work(windows=3, compare=("wanda",))) == 3 * 3 * window
    assert activation_bytes(shape, work(windows=3, evaluation=(5, 7))) == (2 * 3 + 2 * 12) * window


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("options", [{}, {"refit": 0}])
def test_smallest_limit_that_is_named_is_enough(gpu, options, tmp_path):
    workload = work(gpu, **options)
    limits = {"gpu": GIB, "host": GIB} if gpu else {"host": GIB}
    for what in limits:
        with refused(rf"--{what}-memory 1.00: this run needs at least [\d.]+ GiB of (GPU|host) memory") as caught:
            place(LLAMA_70B, workload, limits, tmp_path)
        enough = float(str(caught.value).split("at least ")[1].split()[0])
        limits[what] = int((enough - 0.02) * GIB)
        with refused(f"--{what}-memory"):
            place(LLAMA_70B, workload, limits, tmp_path)
        limits[what] = int(enough * GIB)
    placement, needed = place(LLAMA_70B, workload, limits, tmp_path)
    assert needed == memory_needs(LLAMA_70B, workload, placement)
    assert placement.folder == tmp_path


def test_what_is_given_up_first():
    """On a GPU activations move away first; on a CPU solves become smaller first, and windows go one by one last."""
    workload = work()
    places = [
        place(LLAMA_70B, workload, {"gpu": g * GIB, "host": h * GIB})[0] for g, h in ((80, 64), (24, 64), (24, 12))
    ]
    assert [p.place for p in places] == ["gpu", "host", "file"]
    assert len({(p.batch, p.ahead, p.solver) for p in places}) == 1
    # Inputs are kept where there is room for them, and never in a file.
    assert [p.kept_width for p in places] == [28672, 28672, 0]
    assert place(LLAMA_70B, workload, {"gpu": 16 * GIB, "host": 32 * GIB})[0].kept_width == 8192
    shape, workload = llama(3072, 8192, 28), work(gpu=False, windows=8, seqlen=128)
    roomy, tight = (place(shape, workload, {"host": int(g * GIB)})[0] for g in (16, 2.6))
    assert (roomy.batch, roomy.ahead, roomy.place, roomy.kept_width) == (16, True, "host", 8192)
    assert (tight.batch, tight.place) == (16, "host")
    assert tight.solver < roomy.solver


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(("width", "kept"), [(1023, 0), (1024, 1024), (4096, 4096), (10**6, 4096)])
def test_inputs_that_are_kept(gpu, width, kept):
    """The inputs of o go when those of gate and up have been measured, before those of down are kept."""
    shape, workload = llama(1024, 4096, 2, vocabulary=16), work(gpu=gpu, windows=256, seqlen=2048)
    place = "gpu" if gpu else "host"
    before, after = (memory_needs(shape, workload, Placement(2, place, kept_width=w)) for w in (0, width))
    more = (after.gpu - before.gpu) if gpu else (after.host - before.host)
    # The stage that takes most may be another one.
    most = 1.05 * kept * 256 * 2048 * 2
    assert 0.75 * most <= more <= most + 1


def test_what_is_settled_stays():
    workload = work(gpu=False, windows=8, seqlen=128)
    placement, _ = place(llama(1024, 4096, 2), workload, {"host": 64 * GIB}, fixed={"batch": 5, "solver": 1 << 30})
    assert (placement.batch, placement.solver) == (5, 1 << 30)


def test_experts_have_a_gram_matrix_each(tmp_path):
    shape = shape_of(checkpoint.inspect(save_model(tmp_path, "mixtral")))
    experts = {layer.name: layer.experts for layer in shape.blocks[0].layers}
    assert experts["mlp.experts.down_proj*"] == 4
    assert experts["self_attn.o_proj.weight"] == 0
    workload = work(refit=0, gpu=False, seqlen=32, windows=4)
    wide = replace(shape.blocks[0], layers=tuple(replace(x, d=4096) for x in shape.blocks[0].layers if x.experts))
    one = replace(wide, layers=tuple(replace(x, experts=1) for x in wide.layers))
    many, few = (
        memory_needs(replace(shape, blocks=(b,)), workload, Placement(2)).phases["calibrate"][1] for b in (wide, one)
    )
    assert many - few == pytest.approx(1.05 * 2 * 3 * 4 * 4096**2, rel=1e-3)


def without_layers(shape, blocks):
    """The shape without layers to prune in these blocks."""
    return replace(shape, blocks=tuple(replace(b, layers=()) if n in blocks else b for n, b in enumerate(shape.blocks)))


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("options", [{}, {"refit": 0}, {"compare": ("sparsegpt",)}, {"method": "wanda"}])
def test_blocks_without_layers(gpu, options):
    """Such blocks take the memory of their forward, and of no solve."""
    shape, workload = llama(1024, 4096, 3), work(gpu, **options)
    every = memory_needs(shape, workload, Placement(2))
    assert memory_needs(without_layers(shape, {0, 2}), workload, Placement(2)) == every
    none = memory_needs(without_layers(shape, {0, 1, 2}), workload, Placement(2))
    assert none.phases["start"] == every.phases["start"]
    for phase in ("calibrate", "solve"):
        assert sum(every.phases[phase]) - sum(none.phases[phase]) > 4 * 4096**2
    place(without_layers(shape, {0, 1}), workload, {"gpu": 80 * GIB, "host": 80 * GIB})


MIXTURE = (
    LayerShape("q", 1024, 1024, "q", role=Role(0, "reads")),
    LayerShape("o", 1024, 1024, "o", role=Role(0, "writes", True)),
    LayerShape("up", 768, 1024, "up", 16, Role(1, "reads")),
    LayerShape("down", 1024, 768, "down", 16, Role(1, "reads")),
)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("compared", ["magnitude", "wanda", "sparsegpt"])
def test_a_compared_method_takes_what_it_takes_alone(compared, ranks, mixture, gpu):
    """It measures all layers of a block at once, also where those of sparsefw are measured by stages."""
    shape = llama(1024, 4096, 2, vocabulary=16)
    if mixture:
        shape = replace(shape, blocks=(BlockShape(10**8, MIXTURE),) * 2)
    both, first, second = (
        memory_needs(shape, replace(work(gpu, windows=8, **options), ranks=ranks), Placement(2, "host")).phases
        for options in (dict(compare=(compared,)), dict(method=compared), {})
    )
    # The weights of the dense block.
    copy = int(1.05 * shape.blocks[0].nbytes)
    on_device = 0 if gpu else 1
    for phase in ("calibrate", "solve"):
        assert both[phase][on_device] >= first[phase][on_device] + copy
        assert both[phase][on_device] >= second[phase][on_device]


def test_selected_layers_take_less():
    shape, workload = llama(1024, 4096, 2), work(gpu=False, refit=0)
    (block, _), few = shape.blocks, shape.blocks[0].layers[:4]
    some = replace(shape, blocks=(replace(block, layers=few),) * 2)
    needs, less = (memory_needs(one, workload, Placement(2)).phases for one in (shape, some))
    assert less["start"] == needs["start"]
    # The Gram matrices of the layers with 1024 inputs, and of those with 4096.
    assert needs["calibrate"][1] - less["calibrate"][1] >= 4 * (1024**2 + 4096**2)


def test_zeros_that_are_kept_take_a_mask():
    shape = llama(1024, 4096, 2)
    solve, masked = (
        memory_needs(shape, work(gpu=False, keep_zeros=keep), Placement(2)).phases["solve"][1] for keep in (False, True)
    )
    # One byte for every weight of the largest stage.
    assert masked - solve == pytest.approx(1.05 * 1024 * 4096, rel=1e-6)


def test_shape_of_a_model_reads_nothing(tmp_path):
    source = checkpoint.inspect(save_model(tmp_path, "llama"))
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    shape = shape_of(source)
    assert (shape.hidden, shape.vocabulary, len(shape.blocks), shape.itemsize) == (32, 258, 3, 4)
    assert sum(block.nbytes for block in shape.blocks) + shape.outside == source.nbytes == 4 * shape.parameters
    assert [(layer.name.split(".")[1], layer.rows, layer.d) for layer in shape.blocks[0].layers] == [
        ("q_proj", 32, 32),
        ("k_proj", 16, 32),
        ("v_proj", 16, 32),
        ("o_proj", 32, 32),
        ("gate_proj", 48, 32),
        ("up_proj", 48, 32),
        ("down_proj", 32, 48),
    ]


def test_reading_of_texts_may_take_most():
    shape, workload = llama(1024, 4096, 2), work(gpu=False, windows=8, seqlen=128)
    one = replace(workload, peak=10 * GIB)
    assert memory_needs(shape, one, Placement(2)).host == 10 * GIB
    with refused(r"--host-memory 9.00: this run needs at least 10.01 GiB"):
        place(shape, one, {"host": 9 * GIB})


def test_texts_are_counted():
    shape, long = llama(1024, 4096, 2, vocabulary=16), work(gpu=False, windows=8, seqlen=128, evaluation=(10**7,))
    few = memory_needs(shape, work(gpu=False, windows=8, seqlen=128), Placement(2)).phases["texts"]
    many = memory_needs(shape, long, Placement(2, place="file")).phases["texts"]
    assert few[0] == many[0] == 0
    assert many[1] - few[1] == 4 * 128 * (10**7 - 4 * 8)


def test_threads_have_buffers():
    shape, options = llama(32, 64, 2, vocabulary=16), dict(gpu=False, windows=1, seqlen=16, method="sparsegpt")
    one, nine = (memory_needs(shape, work(threads=n, **options), Placement(1)).phases["write"][1] for n in (1, 9))
    assert nine - one == 8 * 16 * 2**20
