"""A window's way through the blocks of a model, and gradients on the way back, block by block.

Between two blocks a window has hidden states, and tensors that blocks hand on to later blocks. All of them are stored,
and a gradient is kept by what stores its tensor. The graph of a block begins at copies of the stored tensors that the
block reads, its leaves, and ends at those that it makes. Its backward takes the gradients of what it has made, and adds
up those of its leaves. A tensor that a block only passes on stays stored as it is, and so does its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sparsefw.model.activations import Activations, Store, Stored
from sparsefw.model.gradients import SliceGradients
from sparsefw.model.hidden_states import BlockRun, HiddenStates
from sparsefw.model.nested import leaves_of
from sparsefw.model.trace import Values

# Gradients of tensors between blocks.
Gradients = dict[Stored, Tensor]


@dataclass
class Graph:
    """The autograd graph of a block's run, or of what follows the last block.

    Attributes:
        leaves: the tensors that it reads from what blocks have made.
        made: the tensors that it makes for later blocks.
        parameters: the parameters, and their parts, that get gradients.
    """

    leaves: dict[Stored, Tensor] = field(default_factory=dict)
    made: dict[Stored, Tensor] = field(default_factory=dict)
    parameters: Sequence[Tensor] = ()

    def leaf(self, stored: Stored, x: Tensor) -> Tensor:
        """Make a leaf of a stored tensor of floats, and return a copy, which may be changed in place."""
        if not x.is_floating_point():
            return x
        self.leaves[stored] = x.detach().requires_grad_()
        return self.leaves[stored].clone()

    def pull_back(self, ends: Sequence[tuple[Tensor, Tensor]], gradients: Gradients) -> None:
        """Add the gradients of leaves and parameters. `ends` has tensors of the graph, each with its gradient."""
        if not ends:
            return
        tensors, given = zip(*ends, strict=True)
        torch.autograd.backward(tensors, given, inputs=[*self.leaves.values(), *self.parameters])
        for stored, leaf in self.leaves.items():
            if leaf.grad is not None:
                gradients[stored] = gradients[stored] + leaf.grad if stored in gradients else leaf.grad


class Trail:
    """A window on its way through all blocks, which are open.

    Args:
        states: windows before the first block.
        j: number of the window.
        parameters: the parameters of all blocks that get gradients.
        reruns: whether each block runs again on the way back, if there is one. If not, the graphs of all blocks stay in
            memory.
    """

    def __init__(self, states: HiddenStates, j: int, parameters: Sequence[nn.Parameter], reruns: bool) -> None:
        self._parameters, self._store = parameters, Store(states.model.device)
        self.window = replace(states.some([j]), hidden=Activations(self._store, [self._store.put(states.hidden[j])]))
        # Tensors that no block has made have no gradients.
        self._outside = {*self._boundary(self.window)}
        self._starts, self._graphs = list[HiddenStates](), list[Graph]()
        for i in range(len(states.model.blocks)):
            self._starts.append(self.window.fork())
            graph = self._advance(self.window, i, with_graph=not reruns)
            self._graphs += [graph] * (not reruns)
        self._starts.append(self.window)

    def end(self) -> tuple[Graph, Tensor, Values]:
        """Return a graph that begins after the last block, the hidden states there, and other tensors by number."""
        graph, [batch] = Graph(), self.window.batches
        hidden = graph.leaf(self.window.hidden.stored(0), self.window.hidden[0])
        stored = {n: batch.values[n] for n in self.window.model.flow.end}
        return graph, hidden, {n: graph.leaf(x, x.read()) for n, x in stored.items()}

    def pull_back(self, i: int, gradients: Gradients) -> None:
        """Replace the gradients of what block i has made by those of what it has read, and add those of parameters."""
        if self._graphs:
            graph = self._graphs.pop()
        else:
            again, after = self._starts[i].fork(), self._starts[i + 1]
            graph = self._advance(again, i, with_graph=True)
            same = zip(self._boundary(again), self._boundary(after), strict=True)
            graph.made = {known: graph.made[x] for x, known in same if x in graph.made}
        graph.pull_back(
            [(x, gradients.pop(stored)) for stored, x in graph.made.items() if stored in gradients], gradients
        )

    def _advance(self, window: HiddenStates, i: int, with_graph: bool) -> Graph:
        """Move a window through block i, and return the graph of the run."""
        graph = Graph()
        wanted = {*self._boundary(window)} - self._outside

        def read(stored: Stored, x: Tensor) -> Tensor:
            return graph.leaf(stored, x) if with_graph and stored in wanted else x

        def put(x: Tensor) -> Stored:
            stored = self._store.put(x.detach())
            if x.requires_grad:
                graph.made[stored] = x
            return stored

        slices = SliceGradients(self._parameters)
        with torch.set_grad_enabled(with_graph), slices:
            run = BlockRun(window.model, i, None, window.batches[0], read)
            run(read(window.hidden.stored(0), window.hidden[0]))
            batch, hidden = run.next_input()
            window.batches[0] = run.stored(batch, window.model.flow.live[i], put)
            window.hidden = Activations(self._store, [put(hidden)])
        graph.parameters = slices.leaves
        return graph

    @staticmethod
    def _boundary(window: HiddenStates) -> list[Stored]:
        """List what is stored of a window between two blocks, the hidden states first."""
        [batch] = window.batches
        leaves = leaves_of([batch.objects, batch.values])
        return [window.hidden.stored(0), *(x for x in leaves if isinstance(x, Stored))]
