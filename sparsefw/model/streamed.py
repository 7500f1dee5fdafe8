"""A causal language model whose blocks run one at a time.

Its own forward tells what every block receives (masks, rotary tables, per-layer windows), so no architecture is named
here: the blocks are tapped, and later run one by one with what was recorded. Weights are in memory only while they are
used: those of one block, or those outside of the blocks; the next block is read while one is worked on.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.source import Checkpoint, TensorInfo, all_finite, check_finite
from sparsefw.errors import InputError
from sparsefw.model import skeleton
from sparsefw.model.activations import Activations
from sparsefw.timeline import READ, Timeline


class _Stop(Exception):
    """Ends the model's forward once the last block's arguments are known."""


@dataclass
class Stream:
    """Micro-batches on their way through the blocks.

    Attributes:
        hidden: per micro-batch, the input of the next block, (batch, seqlen, d); see `activations`.
        calls: per micro-batch and block, its other arguments (args, kwargs); equal tensors are stored once.
        unchecked: block and number of the micro-batch that moved on last, and whether what it is then is finite, a
            bool on the device; None once that has been looked at.
    """

    hidden: Activations
    calls: list[list[tuple]]
    unchecked: tuple[int, int, Tensor] | None = None

    def fork(self) -> "Stream":
        """Another stream at the same point; the two then run apart."""
        return Stream(self.hidden.fork(), self.calls)


class StreamedModel:
    """A checkpoint's model, whose weights are on `device` only while they are used.

    Args:
        checkpoint: as `sparsefw.checkpoint.source.inspect` found it.
        device: where everything runs.
        read: what gives tensors of the checkpoint.
        timeline: takes the time of reading.

    Attributes:
        blocks: the decoder blocks, in order.
        names: their names in the model, e.g. "model.layers.0".
        max_seqlen: longest window the model takes, or None where it says none.
        notes: one line each about what the user should know of the loading.

    Raises:
        InputError: transformers cannot load it, tensors are missing or do not fit, or no stack of blocks is found.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        read: Callable[[dict[str, TensorInfo], bool], dict[str, Tensor]] = read_tensors,
        timeline: Timeline | None = None,
    ):
        self.device, self._checkpoint, self._read_tensors = torch.device(device), checkpoint, read
        self.timeline = timeline or Timeline()
        self._skeleton = skeleton.build(checkpoint)
        self.model = model = self._skeleton.model
        self.max_seqlen: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.blocks = _find_blocks(model, checkpoint.folder)
        stack = next(name for name, module in model.named_modules() if module is self.blocks)
        self.names = [f"{stack}.{i}" for i in range(len(self.blocks))]
        self.notes = _notes(checkpoint, self._skeleton)
        # By block, and None for what lies outside of them: the checkpoint's tensors.
        self._parts: dict[int | None, list[str]] = {i: [] for i in (*range(len(self.blocks)), None)}
        for name, parameter in self._skeleton.goes_into.items():
            i = parameter.removeprefix(f"{stack}.").partition(".")[0] if parameter.startswith(f"{stack}.") else None
            self._parts[None if i is None else int(i)].append(name)
        self._stored = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
        for buffer in model.buffers():
            if not buffer.is_meta:
                buffer.data = buffer.data.to(self.device)
        self._returns_tuple: bool | None = None
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future] | None = None
        self._inside = 0

    def _read(self, part: int | None) -> dict[str, Tensor]:
        wanted = {name: self._checkpoint.tensors[name] for name in self._parts[part]}
        with self.timeline.span("read", part, READ):
            return self._read_tensors(wanted, self.device.type == "cuda")

    def _run(self, ids: Tensor, tap: Any, **kwargs: Any) -> Any:
        """The model's own forward, with every block replaced by tap(block index, hidden, args, kwargs)."""
        for i, block in enumerate(self.blocks):
            block.forward = lambda h, *a, _i=i, **k: tap(_i, h, a, k)
        try:
            return self.model(input_ids=ids.to(self.device), use_cache=False, **kwargs)
        except _Stop:
            return None
        finally:
            for block in self.blocks:
                del block.forward

    def _as_block_output(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._returns_tuple else hidden

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Inside, what lies outside of the blocks (embeddings, final norm, head) is on the device.

        Raises:
            InputError: it holds NaN or Inf.
        """
        self._inside += 1
        try:
            if self._inside == 1:
                self._skeleton.load(self._read(None), self.device)
                missing = self.model.state_dict().keys() - self._skeleton.goes_into.values()
                self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
                for name, parameter in self.model.requires_grad_(False).named_parameters():
                    if not parameter.is_meta:
                        check_finite(name, parameter)
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                inside = set(self.blocks.modules())
                self._release([(n, m) for n, m in self.model.named_modules() if m not in inside])

    @torch.no_grad()
    def start(self, ids: Tensor, batch_size: int, room: Callable[[], Activations] = Activations) -> Stream:
        """Embed windows of tokens and record what the model passes to every block.

        Args:
            ids: (windows, seqlen) tokens.
            batch_size: windows per micro-batch.
            room: gives the place for their activations.

        Raises:
            InputError: a token that the model has no embedding for, or weights hold NaN or Inf.
        """
        known = self.model.get_input_embeddings().weight.shape[0]
        if ids.max() >= known:
            raise InputError(f"the tokenizer gives token {ids.max()}, but the model embeds {known}: not its tokenizer")
        stream = Stream(room(), [])

        def tap(i: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
            if self._returns_tuple is None:
                # A tensor or a tuple: annotations do not tell, so a real block is asked once.
                block = self._put(0, self._read(0))
                self._returns_tuple = isinstance(type(block).forward(block, hidden, *args, **kwargs), tuple)
                self.close(0)
            if i == 0:
                stream.hidden.append(hidden)
                stream.calls.append([])
            first = stream.calls[0][i] if len(stream.calls) > 1 else None
            stream.calls[-1].append(_shared((args, kwargs), first))
            if i == len(self.blocks) - 1:
                raise _Stop
            return self._as_block_output(hidden)

        with self.outside():
            for batch in ids.split(batch_size):
                self._run(batch, tap)
        return stream

    def open(self, i: int, ahead: bool = True) -> nn.Module:
        """Block i on the device, its parameters checked for NaN and Inf; with `ahead` the next one is read meanwhile.

        Raises:
            InputError: they hold some.
        """
        with self.timeline.span("wait", i):
            tensors = self._ahead[1].result() if self._ahead and self._ahead[0] == i else self._read(i)
        with self.timeline.span("read", i):
            block = self._put(i, tensors)
            for name, parameter in block.named_parameters():
                check_finite(f"{self.names[i]}.{name}", parameter)
        more = ahead and i + 1 < len(self.blocks)
        self._ahead = (i + 1, self._reader.submit(self._read, i + 1)) if more else None
        return block

    def open_as(self, i: int, tensors: dict[str, Tensor]) -> nn.Module:
        """Block i on the device with other weights, under the checkpoint's names."""
        return self._put(i, tensors)

    def _put(self, i: int, tensors: dict[str, Tensor]) -> nn.Module:
        self._skeleton.load(tensors, self.device)
        return self.blocks[i].requires_grad_(False)

    @torch.no_grad()
    def output(self, i: int, stream: Stream, j: int, block: nn.Module | None = None) -> Tensor:
        """Micro-batch j of a stream after block i, or after another module in its place; (batch, seqlen, d)."""
        args, kwargs = stream.calls[j][i]
        out = (block or self.blocks[i])(stream.hidden[j], *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, i: int, stream: Stream) -> None:
        """Run a stream through block i: its output is the next block's input.

        Raises:
            InputError: the output holds NaN or Inf.
        """
        for j in range(len(stream.hidden)):
            self.move(i, stream, j)
        self.settle(stream)

    def move(self, i: int, stream: Stream, j: int, block: nn.Module | None = None) -> None:
        """Run micro-batch j of a stream through block i, or through another module in its place.

        Its output is checked after the next one has been launched, or by `settle`: else a GPU would stand still while
        the host prepares that. No more than one is, so that no more are in memory.

        Raises:
            InputError: the output before holds NaN or Inf.
        """
        out = self.output(i, stream, j, block)
        stream.hidden[j] = out
        finite = all_finite(out)
        self.settle(stream)
        stream.unchecked = (i, j, finite)

    def settle(self, stream: Stream) -> None:
        """Check the micro-batch that moved on last.

        Raises:
            InputError: it holds NaN or Inf.
        """
        if stream.unchecked:
            (i, j, finite), stream.unchecked = stream.unchecked, None
            if not finite:
                check_finite(f"activations after {self.names[i]}", stream.hidden[j])

    @torch.no_grad()
    def loss(self, ids: Tensor, hidden: Tensor) -> float:
        """Mean negative log-likelihood per predicted token, through the model's own final norm, head and caps.

        Args:
            ids: (batch, seqlen) tokens; all but the first of each window are predicted.
            hidden: (batch, seqlen, d), the last block's output.
        """
        logits = self.logits(ids, hidden)[:, :-1].float()
        targets = ids[:, 1:].to(self.device)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """(batch, seqlen, vocabulary), from the last block's output; inside `outside` weights are not read anew."""
        last = len(self.blocks) - 1
        hidden = hidden.to(self.device)
        with self.outside():
            return self._run(ids, lambda i, x, a, k: self._as_block_output(hidden if i == last else x)).logits

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """Block i's tensors under the checkpoint's names, on the host."""
        state = self.blocks[i].state_dict()
        return self._skeleton.exported({f"{self.names[i]}.{name}": tensor for name, tensor in state.items()})

    def other_tensors(self) -> dict[str, Tensor]:
        """All tensors outside the blocks (embeddings, norms, head); of tied ones only the first."""
        stack = self.names[0].rpartition(".")[0] + "."
        with self.outside():
            tied = self.model.all_tied_weights_keys
            state = {n: t for n, t in self.model.state_dict().items() if not n.startswith(stack) and n not in tied}
            return self._skeleton.exported(state)

    def close(self, i: int) -> None:
        """Drop the weights of block i."""
        self._release(self.blocks[i].named_modules(prefix=self.names[i]))

    def _release(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        for path, module in modules:
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or f"{path}.{name}".removeprefix(".") not in self._stored:
                    continue
                empty = torch.empty_like(tensor, device="meta")
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
                else:
                    module._buffers[name] = empty


def _notes(checkpoint: Checkpoint, built: skeleton.Skeleton) -> list[str]:
    notes = []
    if built.unused:
        notes.append(f"not part of the model, not written: {', '.join(built.unused)}")
    other = sorted(n for n, t in checkpoint.tensors.items() if t.dtype.is_floating_point and t.dtype != built.dtype)
    if other:
        notes.append(f"read and written as {built.dtype}: {len(other)} tensors of another dtype, {other[0]} first")
    return notes


def _find_blocks(model: nn.Module, folder: Path) -> nn.ModuleList:
    """The one list of num_hidden_layers modules in the decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outer = {n: m for n, m in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks if other != n)}
    if len(outer) != 1 or not depth:
        found = f"{len(outer)} of them ({', '.join(outer)}) were found" if outer else "none was found"
        raise InputError(
            f"{folder}: unsupported model {type(model).__name__}: "
            f"one list of {depth} decoder blocks (num_hidden_layers) is needed, {found}"
        )
    return next(iter(outer.values()))


def _shared(new: Any, old: Any) -> Any:
    """`new`, with tensors that equal those of the first micro-batch, `old`, replaced by them."""
    if torch.is_tensor(new):
        same = torch.is_tensor(old) and old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
        return old if same else new
    if isinstance(new, tuple | list):
        alike = isinstance(old, tuple | list) and len(old) == len(new)
        return type(new)(_shared(x, old[n] if alike else None) for n, x in enumerate(new))
    if isinstance(new, dict):
        return {k: _shared(v, old.get(k) if isinstance(old, dict) else None) for k, v in new.items()}
    return new
