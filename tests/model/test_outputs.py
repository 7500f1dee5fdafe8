"""Recorded outputs: the difference between the dense model's outputs and a layer's own, times its inputs."""

import copy
import functools
import weakref

import pytest
import torch
from helpers.damaged import damage, damaged_pair, pruned_block, whole_runs
from helpers.families import TOKENS, is_layer, save_model
from helpers.kernel_inputs import DEVICE
from torch import nn

from sparsefw import checkpoint
from sparsefw.kernels.backend import TORCH
from sparsefw.model import StreamedModel, embed
from sparsefw.model.layers import capture, dense_outputs


def seen_by_hooks(block, run, batches, sums):
    """Inputs and outputs of all linear modules in double; `sums` says where to find the sum that a layer writes to."""
    inputs, outputs = {}, {}

    def keep(store, name, tensor):
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        store[name] = [*store.get(name, []), tensor.reshape(-1, tensor.shape[-1]).double()]

    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: keep(inputs, n, a)))
            if name not in sums:
                handles.append(module.register_forward_hook(lambda m, a, out, n=name: keep(outputs, n, out)))
    for name, (kind, module) in sums.items():
        module = block.get_submodule(module)
        if kind == "input":
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: keep(outputs, n, a)))
        else:
            handles.append(module.register_forward_hook(lambda m, a, out, n=name: keep(outputs, n, out)))
    for j in batches:
        run(j)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(x) for n, x in inputs.items()}, {n: torch.cat(x) for n, x in outputs.items()}


# Layers that write to the residual stream, and the place where it can be read after them. In gemma2 a norm comes
# between; gpt_neox adds both of its writers to the stream at the end.
STREAM = {
    "llama": {"self_attn.o_proj": ("input", "post_attention_layernorm"), "mlp.down_proj": ("output", "")},
    "phi3": {"self_attn.o_proj": ("input", "post_attention_layernorm"), "mlp.down_proj": ("output", "")},
    "opt": {"self_attn.out_proj": ("input", "final_layer_norm"), "fc2": ("output", "")},
    "gpt_neox": {"attention.dense": ("output", ""), "mlp.dense_4h_to_h": ("output", "")},
    "gemma2": {},
    "qwen3_moe": {"self_attn.o_proj": ("input", "post_attention_layernorm")},
}


class TestOutputs:
    @pytest.mark.parametrize("family", STREAM)
    def test_of_the_gap_to_the_dense_outputs(self, family, tmp_path):
        """Cross matrices of every layer are those of hooks on the modules."""
        pair = damaged_pair(save_model(tmp_path, family))
        block, dense, batches = pruned_block(pair), pair.dense_block, range(len(pair.pruned))
        damage(capture(block, whole_runs(pair)[0], batches, backend=TORCH, selected=is_layer).layers[:2])
        run, run_dense = whole_runs(pair)
        X, outputs = seen_by_hooks(block, run, batches, STREAM[family])
        _, dense_outputs_seen = seen_by_hooks(dense, run_dense, batches, STREAM[family])
        captured = capture(block, run, batches, backend=TORCH, selected=is_layer, dense=dense_outputs(dense, run_dense))
        crosses = captured.crosses
        assert all(cross.of == "outputs" for cross in crosses.values())
        assert set(crosses) == {layer.name for layer in captured.layers if "experts" not in layer.name}
        linears = {name for name in X if name != "mlp.gate"}
        assert {f"{name}.weight" for name in linears} == set(crosses)
        for name in linears:
            B = (dense_outputs_seen[name] - outputs[name]).T @ X[name]
            torch.testing.assert_close(
                crosses[f"{name}.weight"].matrix.double(), B, rtol=1e-3, atol=1e-5 * B.abs().max().item()
            )
            assert B.abs().max() > 0

    @pytest.mark.parametrize(("family", "layers"), [("llama", 7), ("qwen2_moe", 7), ("qwen3_moe", 4)])
    def test_zero_if_nothing_was_lost(self, family, layers, tmp_path):
        """Experts have no cross matrix, even though they are sent the same tokens here."""
        model = StreamedModel(checkpoint.inspect(save_model(tmp_path, family)), DEVICE)
        states, block = embed(model, TOKENS, 2), model.open(0)
        run, dense = functools.partial(states.output, 0), copy.deepcopy(block)
        same = dense_outputs(dense, lambda j: states.output(0, j, dense))
        crosses = capture(block, run, range(3), backend=TORCH, selected=is_layer, dense=same).crosses
        assert len(crosses) == layers
        assert not any(cross.matrix.any() for cross in crosses.values())

    @pytest.mark.parametrize(
        ("combine", "sums"),
        [
            (lambda x, a, b: x + a(x), {"a": lambda x, a, b: x + a(x)}),
            (lambda x, a, b: x.add(a(x)), {"a": lambda x, a, b: x + a(x)}),
            # Both layers write to the stream at once.
            (lambda x, a, b: x + (a(x) + b(x)), dict.fromkeys("ab", lambda x, a, b: x + a(x) + b(x))),
            (lambda x, a, b: x + a(x).view(4, 5, 8).view(20, 8), {"a": lambda x, a, b: x + a(x)}),
            (lambda x, a, b: x + nn.functional.dropout(a(x), 0.5, False), {"a": lambda x, a, b: x + a(x)}),
            # The result is no longer the layer's output: scaled, or of another shape.
            (lambda x, a, b: torch.add(x, a(x), alpha=3), {"a": lambda x, a, b: a(x)}),
            (lambda x, a, b: x + 3 * a(x), {"a": lambda x, a, b: a(x)}),
            (lambda x, a, b: torch.ones(3, 20, 8) + a(x), {"a": lambda x, a, b: a(x)}),
            (lambda x, a, b: a(x).reshape(40, 4), {"a": lambda x, a, b: a(x)}),
            # Only some tokens are sent to the layer, more than in the dense model.
            (lambda x, a, b: a(x[x[:, 1] > x[0, 1]]), {}),
        ],
    )
    def test_of_sums_that_outputs_go_into(self, combine, sums):
        block = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"}).requires_grad_(False)
        dense, x, lossy = copy.deepcopy(block), torch.randn(20, 8), torch.randn(20, 8)
        x[0, 1], lossy[0, 1] = 0, -100
        runs = (lambda j: combine(lossy, *block.values())), (lambda j: combine(x, *dense.values()))
        crosses = capture(block, runs[0], [0], backend=TORCH, dense=dense_outputs(dense, runs[1])).crosses
        assert set(crosses) == {f"{name}.weight" for name in sums}
        for name, what in sums.items():
            D = what(x, *dense.values()) - what(lossy, *block.values())
            torch.testing.assert_close(crosses[f"{name}.weight"].matrix, D.T @ lossy, rtol=1e-4, atol=1e-3)

    def test_outputs_that_are_written_to_are_not_used(self):
        """An activation in place overwrites the output of the layer before it."""
        block = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 8)).requires_grad_(False)
        dense, x = copy.deepcopy(block), torch.randn(20, 8)
        block[0].weight[:, ::2] = 0
        captured = capture(
            block,
            lambda j: block(x),
            [0],
            backend=TORCH,
            dense=dense_outputs(dense, lambda j: dense(x)),
        )
        assert [layer.name for layer in captured.layers] == ["0.weight", "2.weight"]
        assert set(captured.crosses) == {"2.weight"}

    def test_nothing_of_a_micro_batch_outlives_it(self):
        """Its memory is free for the next one."""
        block, kept = nn.Linear(8, 8).requires_grad_(False), []
        dense = copy.deepcopy(block)

        def run(block, j):
            assert not any(tensor() is not None for number, tensor in kept if number < j)
            x = torch.randn(20, 8)
            out = block(x)
            kept.extend((j, weakref.ref(tensor)) for tensor in (x, out))

        runs = functools.partial(run, block), functools.partial(run, dense)
        put_out = dense_outputs(dense, runs[1])
        captured = capture(block, runs[0], range(3), backend=TORCH, dense=put_out)
        assert (len(kept), set(captured.crosses)) == (12, {"weight"})
