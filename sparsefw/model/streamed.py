"""A causal language model whose weights are in memory only while they are used.

The weights of one block are in memory, or those outside of the blocks. The next block is read while one is worked on.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.source import Checkpoint, TensorInfo
from sparsefw.errors import InputError
from sparsefw.finite import check_finite
from sparsefw.model import skeleton
from sparsefw.model.transformers_private import tie_parameters, tied_parameters
from sparsefw.process import give_back_page_locked
from sparsefw.timeline import READ, Timeline


class StreamedModel:
    """Loads a checkpoint's model block by block. At the end of a `with` statement its reader is shut down.

    Args:
        checkpoint: from `sparsefw.checkpoint.inspect`.
        device: device that the model runs on.
        read: reads tensors of the checkpoint, into page-locked memory if its second argument is true.
        timeline: receives the time of reading.

    Attributes:
        device: device that the model runs on.
        model: the whole model; its weights are on the meta device while they are not used.
        blocks: the decoder blocks, in order.
        names: their names in the model, e.g. "model.layers.0".
        max_seqlen: tokens in the longest window that the model takes; None if its config does not say.
        notes: what the user should know of the loading, one line each.
        timeline: receives the time of reading.
        blocks_return_tuple: whether a block returns its hidden states in a tuple; None until `embed` has run one.

    Raises:
        InputError: transformers cannot load it, tensors are missing or do not fit, or no stack of blocks is found.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        read: Callable[[dict[str, TensorInfo], bool], dict[str, Tensor]] = read_tensors,
        timeline: Timeline | None = None,
    ) -> None:
        self.device, self._checkpoint, self._read_tensors = torch.device(device), checkpoint, read
        self.timeline = timeline or Timeline()
        self._skeleton = skeleton.build(checkpoint)
        self.model = model = self._skeleton.model
        self.max_seqlen: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.blocks = _find_blocks(model, checkpoint.folder)
        stack = next(name for name, module in model.named_modules() if module is self.blocks)
        self.names = [f"{stack}.{i}" for i in range(len(self.blocks))]
        self.notes = _notes(checkpoint, self._skeleton)
        # The checkpoint's tensors by block; under None those outside of the blocks.
        self._tensors_of: dict[int | None, list[str]] = {i: [] for i in (*range(len(self.blocks)), None)}
        for name, parameter in self._skeleton.goes_into.items():
            i = parameter.removeprefix(f"{stack}.").partition(".")[0] if parameter.startswith(f"{stack}.") else None
            self._tensors_of[None if i is None else int(i)].append(name)
        self._stored = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
        for buffer in model.buffers():
            if not buffer.is_meta:
                buffer.data = buffer.data.to(self.device)
        self.blocks_return_tuple: bool | None = None
        self._reader = ThreadPoolExecutor(1)
        # The block that is being read before it is asked for.
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        # How many `with` blocks of `outside` are open.
        self._outside = 0

    def __enter__(self) -> "StreamedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._next = None

    def read(self, i: int | None) -> dict[str, Tensor]:
        """Block i's tensors of the checkpoint, on the host; None: those outside of the blocks."""
        wanted = {name: self._checkpoint.tensors[name] for name in self._tensors_of[i]}
        with self.timeline.span("read", i, READ):
            return self._read_tensors(wanted, self.device.type == "cuda")

    def open(self, i: int, ahead: bool = True) -> nn.Module:
        """Block i on the device, its parameters checked for NaN and Inf.

        Args:
            i: number of the block.
            ahead: whether to read the next block meanwhile.

        Raises:
            InputError: a parameter holds NaN or Inf.
        """
        with self.timeline.span("wait", i):
            tensors = self._next[1].result() if self._next and self._next[0] == i else self.read(i)
        with self.timeline.span("read", i):
            block = self.open_as(i, tensors)
            for name, parameter in block.named_parameters():
                check_finite(f"{self.names[i]}.{name}", parameter)
        # The next block is read into the same page-locked memory if nothing holds it any more.
        del tensors
        self._next = None
        if not ahead:
            give_back_page_locked()
        has_next = ahead and i + 1 < len(self.blocks)
        self._next = (i + 1, self._reader.submit(self.read, i + 1)) if has_next else None
        return block

    def open_as(self, i: int, tensors: dict[str, Tensor]) -> nn.Module:
        """Block i on the device with these weights, which have their names in the checkpoint."""
        self._skeleton.load(tensors, self.device)
        return self.blocks[i].requires_grad_(False)

    def close(self, i: int) -> None:
        """Drop the weights of block i."""
        self._drop(self.blocks[i].named_modules(prefix=self.names[i]))

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Inside the `with` block, the weights outside of the blocks (embeddings, final norm, head) are on the device.

        Raises:
            InputError: they hold NaN or Inf.
        """
        self._outside += 1
        try:
            if self._outside == 1:
                self._skeleton.load(self.read(None), self.device)
                tie_parameters(self.model, self.model.state_dict().keys() - self._skeleton.goes_into.values())
                for name, parameter in self.model.requires_grad_(False).named_parameters():
                    if not parameter.is_meta:
                        check_finite(name, parameter)
                # The embeddings are large, and nothing else is of their size. The checks have waited for the copies.
                give_back_page_locked()
            yield
        finally:
            self._outside -= 1
            if not self._outside:
                inside = set(self.blocks.modules())
                self._drop([(name, m) for name, m in self.model.named_modules() if m not in inside])

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """Block i's tensors under the checkpoint's names, on the host."""
        state = self.blocks[i].state_dict()
        return self._skeleton.exported({f"{self.names[i]}.{name}": tensor for name, tensor in state.items()})

    def other_tensors(self) -> dict[str, Tensor]:
        """All tensors outside of the blocks (embeddings, norms, head) under the checkpoint's names; tied ones once."""
        stack = self.names[0].rpartition(".")[0] + "."
        with self.outside():
            tied = tied_parameters(self.model)
            state = {n: t for n, t in self.model.state_dict().items() if not n.startswith(stack) and n not in tied}
            return self._skeleton.exported(state)

    def _drop(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Replace all stored tensors of these modules by meta tensors."""
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


def _find_blocks(model: PreTrainedModel, folder: Path) -> nn.ModuleList:
    """The one list of num_hidden_layers modules in the decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outer = {n: m for n, m in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks if other != n)}
    if len(outer) != 1 or not depth:
        count = f"{len(outer)} of them ({', '.join(outer)}) were found" if outer else "none was found"
        raise InputError(
            f"{folder}: unsupported model {type(model).__name__}: "
            f"one list of {depth} decoder blocks (num_hidden_layers) is needed, {count}"
        )
    return next(iter(outer.values()))
