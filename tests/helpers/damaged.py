"""A block of a tiny model in two states: dense, and as if blocks and layers before had been pruned."""

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from helpers.families import TOKENS, is_layer
from helpers.kernel_inputs import DEVICE
from torch import Tensor, nn

from sparsefw.checkpoint.source import inspect
from sparsefw.kernels.backend import TORCH
from sparsefw.model.activations import Activations, Store
from sparsefw.model.experts import experts_of
from sparsefw.model.forward import embed
from sparsefw.model.hidden_states import HiddenStates, MicroBatch
from sparsefw.model.layers import Layer, Stage, kind_of
from sparsefw.model.measure import Captured, Pair, measure
from sparsefw.model.nested import ObjectRef, ValueRef
from sparsefw.model.stages import Survey, stages, survey
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.stubs import explained, hidden_of
from sparsefw.model.trace import Call, Trace


def damaged_pair(folder, tokens=TOKENS, store=None, loss: float = 1) -> Pair:
    """The first block of a model. The pruned model's windows have lost this part of every third entry."""
    model = StreamedModel(inspect(folder), DEVICE)
    dense = embed(model, tokens, 2, store)
    block = model.open(0)
    for name, parameter in block.named_parameters():
        # Models begin with biases of zero.
        if name.endswith("bias"):
            parameter.data.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return _damaged(Pair(0, dense.fork(), dense, copy.deepcopy(block), experts_of(block)), loss)


class Block(nn.Module):
    """A block with layers a to d and a norm, whose forward is given."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self._forward = forward
        self.norm = nn.LayerNorm(8)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x, *arguments):
        return self._forward(self, x, *arguments)


def mlp(block, h):
    """The second half of a block, which reads the stream."""
    return block.c(block.b(h.sin()).relu())


def sequential(block, x):
    """Both halves."""
    h = x + block.a(x.tanh())
    return h + mlp(block, h)


def damaged_module(block: nn.Module, batches: list[Tensor], arguments: tuple = ()) -> Pair:
    """A block of one's own, with its micro-batches and other arguments, in the place of a model's."""
    model = SimpleNamespace(blocks=[block], names=["block"], device=torch.device(DEVICE))
    model.explained = partial(explained, "Block")
    block.requires_grad_(False).to(DEVICE)
    call = Call(tuple(ObjectRef(n) for n in range(len(arguments))), {}, outputs=[0], returned=ValueRef(0))
    model.flow = Trace({0: call}, batches[0], {0: []})
    states = HiddenStates(model, Activations(Store(model.device)))
    for batch in batches:
        states.batches.append(MicroBatch(calls={0: call}, objects=[*arguments]))
        states.hidden.append(batch.to(DEVICE))
    return _damaged(Pair(0, states.fork(), states, copy.deepcopy(block), experts_of(block)), 1)


def _damaged(pair: Pair, loss: float) -> Pair:
    for j in range(len(pair.pruned)):
        hidden = pair.pruned.hidden[j]
        lost = loss * (torch.arange(hidden.shape[-1], device=hidden.device) % 3 == 0)
        pair.pruned.hidden[j] = (hidden.float() * (1 - lost)).to(hidden.dtype)
    return pair


def damage(layers: Iterable[Layer], loss: float = 1) -> None:
    """Change layers as pruning does: every third input loses this part of its weights."""
    for layer in layers:
        layer.weight[:, 1::3] *= 1 - loss


def pruned_block(pair: Pair) -> nn.Module:
    """The pruned model's block."""
    return pair.pruned.model.blocks[pair.number]


def surveyed(pair: Pair, selected=is_layer) -> Survey:
    """The survey of the pruned model's block by the first micro-batch."""
    run = pair.pruned.run_of(pair.number, 0)
    return survey(
        pruned_block(pair),
        run,
        pair.pruned.hidden[0],
        selected,
        handed_on=lambda _: pair.pruned.handed_on(pair.number, run),
        split_failures={},
        experts=pair.experts,
    )


def stages_of(pair: Pair, selected=is_layer) -> list[Stage]:
    """The stages of the block."""
    return stages(surveyed(pair, selected))


def described(pair: Pair) -> list[str]:
    """The stages of the block, a line each.

    It has the layers that share an input (their last part is enough to know them by), how they are measured, the cut
    that the stage starts at (0 is the block's input), the function that makes their input, whether it can be kept, and
    the cut that the dense model moves on to.
    """
    found, lines = surveyed(pair), []
    cuts = [0, *(cut.call for cut in found.cuts)]
    for stage in stages(found):
        layers = [layer.name for layer in found.layers if kind_of(layer.gram, found.experts) == stage.key]
        ways = (
            "outputs" if x.input is None else "writes" if x.write else "reads" for x in map(found.roles.get, layers)
        )
        names = (kind_of(name, found.experts).removesuffix(".weight").split(".")[-1] for name in layers)
        line = [*dict.fromkeys(names), *dict.fromkeys(ways), str(cuts.index(stage.start.call))]
        line += [stage.input.function or "block"] if stage.input else []
        line += ["kept"] * stage.cacheable + (
            ["to", str(cuts.index(stage.next_start.call))] if stage.next_start else []
        )
        lines.append(" ".join(line))
    return lines


def measured_stages(pair: Pair, selected=is_layer, keep=True, loss: float = 1, passing=()) -> Iterator[Captured]:
    """Measure and damage one stage after the other; yields what was measured."""
    for stage in stages_of(pair, selected):
        keeps = stage.cacheable and keep
        captured = measure(stage, pair, backend=TORCH, selected=selected, keep=keeps, passing=passing)
        yield captured
        damage(captured.layers, loss)


def check_moves_on(pair: Pair, runs) -> None:
    """Move on to the end of the block: windows are there as by whole runs of both blocks (of `whole_runs`)."""
    run, run_dense = runs
    pair.pruned.advance(pair.number)
    for j in range(len(pair.dense)):
        assert torch.equal(pair.pruned.hidden[j], hidden_of(run(j)))
        assert torch.equal(pair.dense.hidden[j], hidden_of(run_dense(j)))


def whole_runs(pair: Pair):
    """Functions that run a micro-batch through the whole pruned and the whole dense block, from the block's input.

    They read copies of the windows, which stay where they are while those of the pair move on.
    """
    inputs = [[states.hidden[j].clone() for j in range(len(states))] for states in (pair.pruned, pair.dense)]

    def run(j: int):
        with torch.no_grad():
            return pair.pruned.run_of(pair.number, j)(inputs[0][j].clone())

    def run_dense(j: int):
        with torch.no_grad():
            return pair.dense.run_of(pair.number, j, pair.dense_block)(inputs[1][j].clone())

    return run, run_dense
