"""Targets: the weights that repair what earlier layers lost, and the cross matrices they come from."""

import copy
import functools
import weakref

import pytest
import torch
from helpers.families import TOKENS, save_model
from helpers.kernel_inputs import DEVICE, gram, normal
from torch import nn

from sparsefw import checkpoint
from sparsefw.kernels import cpu
from sparsefw.model.layers import Stage, capture, dense_outputs, stages
from sparsefw.model.streamed import StreamedModel
from sparsefw.solver.objective import damped
from sparsefw.solver.target import target

ROWS, D = 13, 40


class TestTarget:
    def objective(self, W, T, G, B):
        """||D - (T - W) X||^2 up to what no T changes."""
        E = T.double() - W.double()
        return (E * (E @ G.double()) - 2 * E * B.double()).sum(1)

    def test_many_steps_solve_the_normal_equations(self):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        H = damped(G, 0.1)
        T = target(W, H, B.clone(), 60, ops=cpu)
        best = W.double() + torch.linalg.solve(H.double(), B.double().T).T
        torch.testing.assert_close(T.double(), best, rtol=0, atol=1e-5 * best.abs().max().item())
        assert (best - W).abs().max() > 0.1

    def test_no_step_goes_away_from_it(self):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        last = torch.zeros(ROWS, dtype=torch.float64, device=DEVICE)
        for steps in range(1, 12):
            now = self.objective(W, target(W, G, B.clone(), steps, ops=cpu), G, B)
            assert (now <= last + 1e-6 * last.abs()).all()
            last = now
        assert (last < 0).all()

    def test_nothing_lost_leaves_the_weights(self):
        W = normal(ROWS, D)
        T = target(W, gram(D), torch.zeros(ROWS, D, device=DEVICE), 4, ops=cpu)
        assert torch.equal(T, W)
        assert T is not W

    def test_weights_of_dead_inputs_stay(self):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        G[3], G[:, 3], B[:, 3] = 0, 0, 0
        T = target(W, G, B, 8, ops=cpu)
        assert torch.equal(T[:, 3], W[:, 3])
        assert T.isfinite().all()
        assert (T[:, 4] != W[:, 4]).any()

    def test_in_fp32_whatever_the_weight(self):
        """What a weight lacks is less than its own rounding to bf16."""
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        half = target(W.bfloat16(), G, B.clone(), 4, ops=cpu)
        assert torch.equal(half, target(W.bfloat16().float(), G, B, 4, ops=cpu))


def damaged_pair(folder, tokens=TOKENS):
    """The first block damaged and dense, what runs micro-batches of different streams through them, their numbers."""
    model = StreamedModel(checkpoint.inspect(folder), DEVICE)
    stream = model.start(tokens, 2)
    block = model.open(0)
    dense, lossy = copy.deepcopy(block), stream.fork()
    # As if blocks before had been pruned, and the first layers of this one.
    lossy.hidden = [h * (torch.arange(h.shape[-1]) % 3 > 0) for h in lossy.hidden]
    first = next(p for name, p in block.named_parameters() if p.dim() == 2)
    first.data[:, ::2] = 0
    runs = (lambda j: model.output(0, lossy, j)), (lambda j: model.output(0, stream, j, dense))
    return block, dense, *runs, range(len(stream.hidden))


def seen_by_hooks(block, run, batches, sums):
    """Input and output of all linear modules, double; `sums`: by layer, of which module its output is what."""
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


# Layers that write to the residual stream, and where the stream can be read after them. In gemma2 a norm comes between;
# gpt_neox adds both of its writers to the stream at the end, when attention.dense has long been pruned.
STREAM = {
    "llama": {"self_attn.o_proj": ("input", "post_attention_layernorm"), "mlp.down_proj": ("output", "")},
    "phi3": {"self_attn.o_proj": ("input", "post_attention_layernorm"), "mlp.down_proj": ("output", "")},
    "opt": {"self_attn.out_proj": ("input", "final_layer_norm"), "fc2": ("output", "")},
    "gpt_neox": {"mlp.dense_4h_to_h": ("output", "")},
    "gemma2": {},
    "qwen3_moe": {"self_attn.o_proj": ("input", "post_attention_layernorm")},
}


class TestCrossMatrices:
    @pytest.mark.parametrize("family", STREAM)
    def test_of_what_the_outputs_lack(self, family, tmp_path):
        """Against hooks on the modules, for every layer, in stages as a run takes them."""
        block, dense, run, run_dense, batches = damaged_pair(save_model(tmp_path, family))
        X, there = seen_by_hooks(block, run, batches, STREAM[family])
        _, should = seen_by_hooks(dense, run_dense, batches, STREAM[family])
        found = {}
        for stage in stages(block, functools.partial(run, 0)):
            layers, _, crosses = capture(
                block,
                run,
                batches,
                ops=cpu,
                precision="ieee",
                stage=stage,
                dense=dense_outputs(dense, run_dense, stage),
            )
            experts = {layer.name for layer in layers if "experts" in layer.name}
            assert set(crosses) == {layer.name for layer in layers} - experts
            found |= crosses
        linears = {name for name in X if name != "mlp.gate"}
        assert {f"{name}.weight" for name in linears} == set(found)
        for name in linears:
            B = (should[name] - there[name]).T @ X[name]
            torch.testing.assert_close(found[f"{name}.weight"].double(), B, rtol=1e-3, atol=1e-5 * B.abs().max().item())
            assert B.abs().max() > 0

    @pytest.mark.parametrize(("family", "layers"), [("llama", 7), ("qwen2_moe", 7), ("qwen3_moe", 4)])
    def test_nothing_is_lacking_where_nothing_was_lost(self, family, layers, tmp_path):
        """Nor are experts, sent the same tokens here, among the layers that something could be lacking of."""
        model = StreamedModel(checkpoint.inspect(save_model(tmp_path, family)), DEVICE)
        stream, block = model.start(TOKENS, 2), model.open(0)
        run, dense = functools.partial(model.output, 0, stream), copy.deepcopy(block)
        same = dense_outputs(dense, lambda j: model.output(0, stream, j, dense))
        _, _, crosses = capture(block, run, range(3), ops=cpu, precision="ieee", dense=same)
        assert len(crosses) == layers
        assert not any(B.any() for B in crosses.values())

    @pytest.mark.parametrize(
        ("combine", "sums"),
        [
            (lambda x, a, b: x + a(x), {"a": lambda x, a, b: x + a(x)}),
            (lambda x, a, b: x.add(a(x)), {"a": lambda x, a, b: x + a(x)}),
            # Both write to the stream at once.
            (lambda x, a, b: x + (a(x) + b(x)), dict.fromkeys("ab", lambda x, a, b: x + a(x) + b(x))),
            (lambda x, a, b: x + a(x).view(4, 5, 8).view(20, 8), {"a": lambda x, a, b: x + a(x)}),
            (lambda x, a, b: x + nn.functional.dropout(a(x), 0.5, False), {"a": lambda x, a, b: x + a(x)}),
            # No longer what the layer put out: scaled, of another shape.
            (lambda x, a, b: torch.add(x, a(x), alpha=3), {"a": lambda x, a, b: a(x)}),
            (lambda x, a, b: x + 3 * a(x), {"a": lambda x, a, b: a(x)}),
            (lambda x, a, b: torch.ones(3, 20, 8) + a(x), {"a": lambda x, a, b: a(x)}),
            (lambda x, a, b: a(x).reshape(40, 4), {"a": lambda x, a, b: a(x)}),
            # Only some tokens, more than in the dense model.
            (lambda x, a, b: a(x[x[:, 1] > x[0, 1]]), {}),
        ],
    )
    def test_of_sums_that_outputs_go_into(self, combine, sums):
        block = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"}).requires_grad_(False)
        dense, x, lossy = copy.deepcopy(block), torch.randn(20, 8), torch.randn(20, 8)
        x[0, 1], lossy[0, 1] = 0, -100
        runs = (lambda j: combine(lossy, *block.values())), (lambda j: combine(x, *dense.values()))
        _, _, crosses = capture(block, runs[0], [0], ops=cpu, precision="ieee", dense=dense_outputs(dense, runs[1]))
        assert set(crosses) == {f"{name}.weight" for name in sums}
        for name, what in sums.items():
            D = what(x, *dense.values()) - what(lossy, *block.values())
            torch.testing.assert_close(crosses[f"{name}.weight"], D.T @ lossy, rtol=1e-4, atol=1e-3)

    def test_outputs_that_are_written_to_are_not_used(self):
        """An activation in place: what is left there is not what the layer put out."""
        block = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 8)).requires_grad_(False)
        dense, x = copy.deepcopy(block), torch.randn(20, 8)
        block[0].weight[:, ::2] = 0
        layers, _, crosses = capture(
            block,
            lambda j: block(x),
            [0],
            ops=cpu,
            precision="ieee",
            dense=dense_outputs(dense, lambda j: dense(x)),
        )
        assert [layer.name for layer in layers] == ["0.weight", "2.weight"]
        assert set(crosses) == {"2.weight"}

    def test_nothing_of_a_micro_batch_outlives_it(self):
        """The memory is the next one's."""
        block, kept = nn.Linear(8, 8).requires_grad_(False), []
        dense = copy.deepcopy(block)

        def run(block, j):
            assert not any(tensor() is not None for number, tensor in kept if number < j)
            x = torch.randn(20, 8)
            out = block(x)
            kept.extend((j, weakref.ref(tensor)) for tensor in (x, out))

        runs = functools.partial(run, block), functools.partial(run, dense)
        put_out = dense_outputs(dense, runs[1])
        _, _, crosses = capture(block, runs[0], range(3), ops=cpu, precision="ieee", dense=put_out)
        assert (len(kept), set(crosses)) == (12, {"weight"})


class TestStages:
    @pytest.mark.parametrize(
        ("family", "expected"),
        [
            ("llama", "self_attn.q_proj:self_attn.v_proj self_attn.o_proj mlp.gate_proj:mlp.up_proj mlp.down_proj"),
            # Numbers in names are no experts.
            ("opt", "self_attn.q_proj:self_attn.v_proj self_attn.out_proj fc1 fc2"),
            # Parallel branches read inputs of their own.
            ("gpt_neox", "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        ],
    )
    def test_in_the_order_of_use(self, family, expected, tmp_path):
        """In all of these the last layer writes to the stream, which is what the block puts out."""
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, family))
        names = [pair.partition(":")[::2] for pair in expected.split()]
        assert stages(block, functools.partial(run, 0)) == [
            Stage(f"{key}.weight", f"{last or key}.weight", (key, last) == names[-1], (key, last) == names[-2])
            for key, last in names
        ]

    def test_experts_go_together(self, tmp_path):
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, "mixtral"))
        found = stages(block, functools.partial(run, 0))
        assert found[2:] == [
            Stage("mlp.experts.gate_up_proj*", None),
            Stage("mlp.experts.down_proj*", None, final=True, moves=True),
        ]

    def test_the_dense_model_moves_on_last_where_the_block_puts_out_something_else(self, tmp_path):
        """In gemma2 a norm follows the last layer."""
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, "gemma2"))
        assert [stage.moves for stage in stages(block, functools.partial(run, 0))] == [False, False, False, True]
        layer, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(20, 8)
        assert stages(layer, lambda: layer(x)) == [Stage("weight", "weight", final=True, moves=True)]
        assert stages(nn.Identity(), lambda: x) == []

    def test_the_stage_that_moves_on_sees_no_further_than_others(self):
        """What its layers put out goes into a sum behind the next layer, which the pruned block does not reach."""

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x):
                first = self.one(x)
                return first + self.two(first.relu())

        block, x = Block().requires_grad_(False), torch.randn(20, 8)
        first, last = stages(block, lambda: block(x))
        assert (first.moves, last.moves) == (True, False)
        moved = []
        put_out = dense_outputs(block, lambda j: moved.append(block(x)), first)
        assert torch.equal(put_out(0)("one.weight"), block.one(x))
        assert torch.equal(moved[0], block(x))

    @pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
    def test_give_what_the_whole_block_gives(self, family, tmp_path):
        block, _, run, _, batches = damaged_pair(save_model(tmp_path, family))
        layers, grams, _ = capture(block, run, batches, ops=cpu, precision="ieee")
        staged, staged_grams = [], {}
        for stage in stages(block, functools.partial(run, 0)):
            some, some_grams, _ = capture(block, run, batches, ops=cpu, precision="ieee", stage=stage)
            staged += some
            staged_grams |= some_grams
        assert {(layer.name, layer.gram) for layer in staged} == {(layer.name, layer.gram) for layer in layers}
        assert staged_grams.keys() == grams.keys()
        for name, G in grams.items():
            assert torch.equal(staged_grams[name], G)

    def test_branches_that_share_an_input_go_together(self):
        """As in GPT-J: the second reads the input again after other layers have been used."""
        block, x = _Parallel().requires_grad_(False), torch.randn(20, 8)
        found = stages(block, lambda: block(x))
        assert found == [Stage("one.weight", "three.weight", moves=True), Stage("two.weight", "two.weight", final=True)]
        layers, grams, _ = capture(block, lambda j: block(x), [0], ops=cpu, precision="ieee", stage=found[0])
        assert [layer.name for layer in layers] == ["one.weight", "three.weight"]
        assert list(grams) == ["one.weight"]

    def test_run_no_more_of_the_block_than_they_need(self, tmp_path):
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, "llama"))
        used = set()
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_, n=name: used.add(n))
        reached = []
        for stage in stages(block, functools.partial(run, 0)):
            used.clear()
            capture(block, run, [0], ops=cpu, precision="ieee", stage=stage)
            reached.append(len(used))
        assert reached == [3, 4, 6, 7]


class _Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.two(self.one(x)) + self.three(x)
