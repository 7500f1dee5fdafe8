"""Stages against the dense model: Gram and cross matrices, and windows that move on inside the block."""

import functools

import pytest
import torch
from helpers.damaged import check_moves_on, damage, damaged_pair, measured_stages, pruned_block, stages_of, whole_runs
from helpers.families import first_is_fast, is_layer, save_model
from helpers.kernel_inputs import DEVICE
from helpers.tensors import assert_equal

from sparsefw.kernels.backend import TORCH
from sparsefw.model.activations import Store
from sparsefw.model.measure import measure
from sparsefw.model.partial_forward import INPUT
from sparsefw.model.stubs import hidden_of
from sparsefw.solver.targets import cross_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# By family: the layers that add their product to the residual stream, and the module that the sum after them is the
# input of, "" for the output of the block. The stream before the first of them is the block's input, and that before
# the second one the sum after the first.
_LLAMA = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}
WRITERS = {
    "llama with biases": _LLAMA,
    "qwen2_moe": {"self_attn.o_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": ""},
    "mamba": {"mixer.out_proj": ""},
}


class Seen:
    """Inputs and outputs of the modules in whole runs, by hooks; (tokens, width), in their own dtype."""

    def __init__(self, block, run, count):
        self.inputs, self.outputs, handles = {}, {}, []
        for name, module in block.named_modules():
            handles.append(module.register_forward_pre_hook(functools.partial(self._see_input, name), with_kwargs=True))
            handles.append(module.register_forward_hook(functools.partial(self._see_output, name)))
        for j in range(count):
            run(j)
        for handle in handles:
            handle.remove()

    def _see_input(self, name, module, args, kwargs):
        self._keep(self.inputs, name, args[0] if args else next(iter(kwargs.values()), None))

    def _see_output(self, name, module, args, output):
        self._keep(self.outputs, name, hidden_of(output))

    def _keep(self, store, name, tensor):
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
            store.setdefault(name, []).append(tensor.reshape(-1, tensor.shape[-1]).clone())

    def input(self, name):
        return torch.cat(self.inputs[name])

    def output(self, name):
        return torch.cat(self.outputs[name])

    def stream(self, module):
        """The stream before a module, or after the block if there is no such module."""
        return self.input(module) if module else self.output("")


def truth_of(family, name, layer, pruned, dense):
    """B in float64, and B of outputs that are recorded."""
    X, W = pruned.input(name).double(), layer.weight.double()
    writers = WRITERS.get(family, {})
    if name not in writers:
        recorded = (dense.output(name) - pruned.output(name)).double()
        return W @ (dense.input(name).double() - X).T @ X, recorded.T @ X
    before = [*writers.values()][[*writers].index(name) - 1] if [*writers].index(name) else None
    h = pruned.input("") if before is None else pruned.stream(before)
    S = dense.stream(writers[name])
    bias = 0 if layer.bias is None else layer.bias.double()
    gap = S.double() - h.double() - bias
    recorded = (S - pruned.stream(writers[name])).double()
    return gap.T @ X - W @ X.T @ X, recorded.T @ X


def error(B, truth):
    return ((B.double() - truth).norm() / truth.norm()).item()


def errors_by_layer(family, pair, loss):
    """For every layer, in the order of use: its way, and the errors of B as measured and of recorded outputs."""
    block, (run, run_dense), count = pruned_block(pair), whole_runs(pair), len(pair.dense)
    dense, found = Seen(pair.dense_block, run_dense, count), {}
    for captured in measured_stages(pair, keep=False, loss=loss):
        pruned = Seen(block, run, count)
        for layer in captured.layers:
            name = layer.name.removesuffix(".weight")
            if layer.name not in captured.crosses:
                # The time steps of mamba are multiplied from the left, so that tokens are the last axis of the output.
                assert "experts" in name or name == "mixer.dt_proj"
                continue
            X, G = pruned.input(name).double(), captured.grams[layer.gram]
            torch.testing.assert_close(G.double(), X.T @ X, rtol=1e-4, atol=1e-5 * G.max().item())
            cross = captured.crosses[layer.name]
            B = cross_rows([cross], [(every := slice(0, len(layer.weight)), every)], layer.weight.float(), G)
            truth, recorded = truth_of(family, name, layer, pruned, dense)
            assert truth.norm() > 0
            found[name] = cross.of, error(B, truth), error(recorded, truth)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", first_is_fast([*WRITERS, "gemma2"]))
def test_crosses_are_those_of_float64(family, dtype, tmp_path):
    """Every layer reads the stream or writes to it.

    In bf16 its cross matrix is better than that of recorded outputs: they are rounded, and nearly the same in both
    models.
    """
    pair = damaged_pair(save_model(tmp_path, family, DTYPES[dtype]), loss=LOSS)
    found = errors_by_layer(family, pair, LOSS)
    linears = {name for name, module in pruned_block(pair).named_modules() if type(module).__name__ in LINEAR}
    assert found.keys() == {name for name in linears if not name.endswith(("gate", "dt_proj"))}
    for name, (form, measured, recorded) in found.items():
        assert form == ("streams" if name in WRITERS.get(family, {}) else "inputs")
        if dtype == "fp32":
            assert measured < 1e-4, name
        elif form == "inputs":
            assert measured < min(0.2 * recorded, 2e-3), name
        elif family != "mamba":
            assert measured < min(0.9 * recorded, 0.02), name
        else:
            # Its stream is in fp32, in which outputs lose nothing.
            assert measured < 0.02, name


# The part of inputs and weights that is lost.
LOSS = 0.1

LINEAR = ("Linear", "Conv1D")


def results_of(folder, place, keep):
    """All matrices of a block, whose windows move on as by whole runs."""
    pair, found = damaged_pair(folder, store=Store(DEVICE, place)), {}
    runs = whole_runs(pair)
    for n, captured in enumerate(measured_stages(pair, keep=keep)):
        found |= {(n, name): G.clone() for name, G in captured.grams.items()}
        found |= {(n, name, cross.of): cross.matrix.clone() for name, cross in captured.crosses.items()}
    check_moves_on(pair, runs)
    assert pair.pruned.position == pair.dense.position == INPUT
    assert pair.pruned.kept is pair.dense.kept is None
    for windows in (pair.pruned, pair.dense):
        windows.close()
    return found


@pytest.mark.parametrize("family", first_is_fast(["llama", "mixtral", "mamba"]))
def test_kept_inputs_and_placement_change_nothing(family, tmp_path):
    # Blocks of mamba in bf16 return fp32, which does not fit the place of their input.
    folder = save_model(tmp_path, family, torch.float32 if family == "mamba" else torch.bfloat16)
    plain = results_of(folder, "gpu", keep=False)
    for place, keep in (("gpu", True), ("host", True), ("file", False), ("file", True)):
        found = results_of(folder, place, keep)
        assert_equal(found, plain)


class Counted:
    """Counts the layers of a block that really run."""

    def __init__(self, block):
        self.runs = []
        for name, module in block.named_modules():
            if type(module).__name__ in LINEAR:
                module.register_forward_hook(functools.partial(self._count, name))

    def _count(self, name, module, args, output):
        if not output.is_meta:
            self.runs.append(name.split(".")[-1].removesuffix("_proj"))

    def taken(self):
        """The layers that have run since, with one micro-batch."""
        runs, self.runs = self.runs, []
        return " ".join(runs)


# By whether inputs are kept: the layers that run in each stage, in the pruned and in the dense model, and
# those that run when the pruned model moves on. A stage ends at its layers' input. The dense model runs as far as the
# sum after a layer that writes to the stream, and from there in the next stages.
RUNS = {
    False: ([("", ""), ("q k v", "q k v o"), ("q k v o", ""), ("gate up", "gate up down")], "gate up down"),
    True: ([("", ""), ("q k v", "q k v o"), ("o", ""), ("gate up", "gate up down")], "down"),
}


@pytest.mark.parametrize("keep", RUNS)
def test_layers_that_run(keep, tmp_path):
    pair = damaged_pair(save_model(tmp_path, "llama"), tokens=torch.arange(2, 26)[None])
    # The hooks ask tensors where they are, which are calls, too. So they come first.
    pruned, dense = Counted(pruned_block(pair)), Counted(pair.dense_block)
    expected, last = RUNS[keep]
    order, runs = stages_of(pair), []
    pruned.taken()
    for stage in order:
        captured = measure(stage, pair, backend=TORCH, selected=is_layer, keep=keep and stage.cacheable)
        runs.append((pruned.taken(), dense.taken()))
        damage(captured.layers)
    assert runs == expected
    pair.pruned.advance(0)
    assert pruned.taken() == last
