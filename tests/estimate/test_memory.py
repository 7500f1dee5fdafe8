"""Memory that is expected is what a run takes, and a run keeps to what it may take."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.checkpoints import refused
from helpers.families import save_model

from sparsefw import checkpoint
from sparsefw.estimate.memory import GIB, Work, activation_bytes, needs, place, stages
from sparsefw.model.placement import Placement
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape, shape_of
from sparsefw.run import parse_arguments, settings_of

random_checkpoint = __import__("random_checkpoint")


def llama(hidden, intermediate, depth, pairs=8, vocabulary=128256):
    """Of heads of 128, in bf16."""
    layers = [("q", hidden, hidden, "q"), ("k", pairs * 128, hidden, "q"), ("v", pairs * 128, hidden, "q")]
    layers += [("o", hidden, hidden, "o"), ("gate", intermediate, hidden, "gate"), ("up", intermediate, hidden, "gate")]
    layers.append(("down", hidden, intermediate, "down"))
    layers = tuple(LayerShape(*layer) for layer in layers)
    size = sum(layer.rows * layer.d for layer in layers) + 2 * hidden
    outside = 2 * vocabulary * hidden + hidden
    return ModelShape(
        (BlockShape(2 * size, layers),) * depth, 2 * outside, hidden, vocabulary, 0, 2, depth * size + outside
    )


def work(*flags, gpu=True, windows=256, held_out=(), seqlen=2048, methods=("sparsefw",), threads=2):
    return Work(
        windows, held_out, seqlen, methods, settings_of(parse_arguments(["--model", "x", *flags])), gpu, threads
    )


LLAMA_70B, LLAMA_405B = llama(8192, 28672, 80), llama(16384, 53248, 126)


def test_goals():
    """By what is expected; a GPU has to confirm it."""
    place(LLAMA_70B, work(), {"gpu": 16 * GIB, "host": 32 * GIB})
    place(LLAMA_405B, work(), {"gpu": 48 * GIB, "host": 64 * GIB})


def test_nothing_grows_with_depth():
    for gpu in (True, False):
        shallow, deep = (needs(llama(1024, 4096, depth), work(gpu=gpu), Placement(2)) for depth in (4, 80))
        assert shallow == deep


@pytest.mark.parametrize(("depth", "beside"), [(1, 0), (2, 1), (3, 2), (4, 2)])
def test_blocks_beside_the_one_at_work(depth, beside):
    """The one that is read and the one that is written, where there are so many."""
    shape = llama(1024, 4096, depth, vocabulary=16)
    alone = needs(llama(1024, 4096, 1, vocabulary=16), work(), Placement(2)).phases["solve"][1]
    blocks = (needs(shape, work(), Placement(2)).phases["solve"][1] - alone) / shape.blocks[0].nbytes
    assert blocks == pytest.approx(1.05 * beside, abs=1e-3)


@pytest.mark.parametrize(
    ("itemsize", "gpu", "windows", "products"),
    [(2, False, 1, 2 * 64), (2, False, 99, 1024), (4, False, 9, 0), (2, True, 9, 0)],
)
def test_products_of_experts_in_half_precision(itemsize, gpu, windows, products):
    """oneDNN makes code for every number of tokens that an expert is sent, up to so many."""
    layers = (LayerShape("up", 64, 32, "up", 8), LayerShape("down", 32, 64, "down", 8), LayerShape("o", 32, 32, "o"))
    shape = replace(llama(32, 64, 2), blocks=(BlockShape(10**6, layers),) * 2, itemsize=itemsize)
    dense = replace(shape, blocks=(BlockShape(10**6, tuple(replace(layer, experts=0) for layer in layers)),) * 2)
    process = [
        needs(
            one, work("--method", "wanda", windows=windows, seqlen=64, gpu=gpu, methods=("wanda",)), Placement(64)
        ).phases["write"][1]
        for one in (shape, dense)
    ]
    assert process[0] - process[1] == products * 560 * 1024


def test_stages_of_a_block():
    assert [[layer.name for layer in stage] for stage in stages(LLAMA_70B.blocks[0])] == [
        ["q", "k", "v"],
        ["o"],
        ["gate", "up"],
        ["down"],
    ]


def test_activations_of_every_stream():
    shape = llama(1024, 4096, 2)
    window = 2048 * 1024 * 2
    assert activation_bytes(shape, work("--refit", "0", windows=3)) == 3 * window
    assert activation_bytes(shape, work(windows=3)) == 2 * 3 * window
    assert activation_bytes(shape, work(windows=3, methods=("wanda", "sparsefw"))) == 3 * 3 * window
    assert activation_bytes(shape, work(windows=3, held_out=(5, 7))) == (2 * 3 + 2 * 12) * window


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("flags", [(), ("--refit", "0")])
def test_smallest_budget_that_is_named_is_enough(gpu, flags, tmp_path):
    todo = work(*flags, gpu=gpu)
    budgets = {"gpu": GIB, "host": GIB} if gpu else {"host": GIB}
    for what in budgets:
        with refused(rf"--{what}-memory 1.00: this run needs at least [\d.]+ GiB of (GPU|host) memory") as caught:
            place(LLAMA_70B, todo, budgets, tmp_path)
        enough = float(str(caught.value).split("at least ")[1].split()[0])
        budgets[what] = int((enough - 0.02) * GIB)
        with refused(f"--{what}-memory"):
            place(LLAMA_70B, todo, budgets, tmp_path)
        budgets[what] = int(enough * GIB)
    placement, needed = place(LLAMA_70B, todo, budgets, tmp_path)
    assert needed == needs(LLAMA_70B, todo, placement)
    assert placement.folder == tmp_path


def test_what_is_given_up_first():
    """On a GPU activations move away first; on a CPU solves become smaller first, and windows go one by one last."""
    todo = work()
    places = [place(LLAMA_70B, todo, {"gpu": g * GIB, "host": h * GIB})[0] for g, h in ((80, 64), (24, 64), (24, 12))]
    assert [p.place for p in places] == ["gpu", "host", "file"]
    assert len({(p.batch, p.ahead, p.solver) for p in places}) == 1
    shape, todo = llama(3072, 8192, 28), work(gpu=False, windows=8, seqlen=128)
    roomy, tight = (place(shape, todo, {"host": int(g * GIB)})[0] for g in (16, 2.4))
    assert (roomy.batch, roomy.ahead, roomy.place) == (32, True, "host")
    assert (tight.batch, tight.place) == (32, "host")
    assert tight.solver < roomy.solver


def test_what_is_settled_stays():
    todo = work(gpu=False, windows=8, seqlen=128)
    placement, _ = place(llama(1024, 4096, 2), todo, {"host": 64 * GIB}, fixed={"batch": 5, "solver": 1 << 30})
    assert (placement.batch, placement.solver) == (5, 1 << 30)


def test_experts_have_a_gram_matrix_each(tmp_path):
    shape = shape_of(checkpoint.inspect(save_model(tmp_path, "mixtral")))
    experts = {layer.name: layer.experts for layer in shape.blocks[0].layers}
    assert experts["mlp.experts.down_proj*"] == 4
    assert experts["self_attn.o_proj.weight"] == 0
    todo = work("--refit", "0", gpu=False, seqlen=32, windows=4)
    wide = replace(shape.blocks[0], layers=tuple(replace(x, d=4096) for x in shape.blocks[0].layers if x.experts))
    one = replace(wide, layers=tuple(replace(x, experts=1) for x in wide.layers))
    many, few = (needs(replace(shape, blocks=(b,)), todo, Placement(2)).phases["calibrate"][1] for b in (wide, one))
    assert many - few == pytest.approx(1.05 * 2 * 3 * 4 * 4096**2, rel=1e-3)


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


SHAPES = {
    # Gram matrices are the most; then what lies outside of the blocks.
    "wide": ({"hidden_size": 256, "intermediate_size": 7168, "vocab_size": 2048}, ["--nsamples", "4"]),
    "outside": (
        {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 160000},
        ["--nsamples", "8", "--refit", "0"],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_peak_is_the_measured_one(shape, tmp_path):
    sizes, flags = SHAPES[shape]
    heads = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
    random_checkpoint.generate(tmp_path / "model", "llama", max_position_embeddings=512, **heads, **sizes)
    (tmp_path / "text.txt").write_text("".join(f"{n}: a rose is a rose is a rose.\n" for n in range(600)))
    command = [sys.executable, "-m", "sparsefw.run", "--model", str(tmp_path / "model")]
    command += ["--dataset", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out"), "--kernel", "torch"]
    done = subprocess.run(
        [*command, "--seqlen", "256", "--steps", "1", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    measured, expected = report["peak_memory"]["host_bytes"], report["memory"]["host_expected_bytes"]
    # Beside what every process has.
    assert measured > 900 * 2**20
    assert expected == pytest.approx(measured, rel=0.15)
