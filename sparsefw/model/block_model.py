"""A model that runs one block at a time (`BlockModel`), and its variant for a model in memory (`ResidentModel`)."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsefw import arithmetic
from sparsefw.arithmetic import check_finite, computed, computes_in_fp32
from sparsefw.caller import as_python
from sparsefw.checkpoint.tensors import Loadables, Tensors, dequantized
from sparsefw.data.batches import Batch
from sparsefw.errors import InputError
from sparsefw.memory import release_pinned, to_host
from sparsefw.model.layers import quantized
from sparsefw.model.path import Path, path_through
from sparsefw.model.settings import asked_for_no_more, attention_by_calls, masks_kept
from sparsefw.model.skeleton import max_seqlen
from sparsefw.model.stubs import TEXT, block_type, explained
from sparsefw.model.swap import (
    MakeTensor,
    SharedParameters,
    TensorSlot,
    fill,
    is_copied,
    on_device,
    restore,
    shared_parameters,
    slots_of,
)
from sparsefw.timeline import READ, Timeline

# Called with the dtype of a model's weights, and the device; returns whether the model computes in fp32 there.
InFp32 = Callable[[torch.dtype, torch.device], bool]


class BlockModel:
    """A model that runs one block at a time.

    The device holds the weights of one block, or the weights that the forward needs outside of the blocks. While a
    block is open, the next block is read. The end of a `with` statement gives the model its own tensors back.

    Args:
        model: the whole model.
        path: the path of the model's forward.
        shared: parameters that several blocks share. They stay dense.
        device: device that the model runs on.
        in_fp32: whether a model with weights in half precision computes in fp32.

    Attributes:
        model, device, shared, in_fp32: the arguments.
        timeline: the times at which blocks are read and worked on.
        class_name: name of the model's class, for messages.
        runs: the module whose forward runs: the model, or its text model, see `Path`.
        input_kind: the kind of input of the forward, in words, for messages.
        blocks: the blocks in the order of their calls. A block that is called twice is listed twice, and stays dense.
        blocks_by_name: each block once, by its name in the model.
        names: names of `blocks` in the model, e.g. "model.layers.0".
        block_types: types of `blocks`, see `stubs.block_type`.
        unique_blocks: numbers in `blocks` without repetitions: the first call of each block.
        unused: blocks that the forward does not call, by name. They are not changed.
        flow: the trace of the forward.
        templates: what blocks of each type return.
        after_blocks: functions that compute logits, by the shapes of their inputs, see `forward.logits_after_blocks`.
            They are valid while the weights outside of the blocks are loaded.
        logits_itemsize: bytes of an entry of the logits; 0 if the model returns no logits.
        vocabulary: number of the tokens that the model embeds; None if the model may read other input than tokens.
        max_seqlen: number of tokens in the longest window that the model takes; None if the config sets no limit.
        pieces: names of all tensors outside of `blocks` that are written, in groups (pieces) that fit into memory.
        piece_bytes: bytes of each piece.
        notes: what the user should know about the model, one line each.
        outside_bytes: bytes of the parameters outside of the blocks that are copied to the device for a forward.
        quantized_bytes: peak bytes of stored tensors that are in memory together with the tensors made from them.
        joined_bytes: bytes of the largest parameter that is made from several stored tensors.
    """

    def __init__(
        self, model: nn.Module, path: Path, shared: SharedParameters, device: torch.device, in_fp32: bool = False
    ) -> None:
        self.model, self.shared, self.device, self.timeline = model, shared, torch.device(device), Timeline()
        self.in_fp32, self.class_name = in_fp32, type(model).__name__
        self.runs, self.input_kind, self.unused, self.names = path.runs, path.input_kind, path.unused, path.order
        self.flow, self.templates, self.logits_itemsize = path.flow, path.templates, path.logits_itemsize
        self.blocks_by_name = path.blocks
        self.blocks = [path.blocks[name] for name in path.order]
        self.block_types = [block_type(block) for block in self.blocks]
        self.unique_blocks = [self.names.index(name) for name in dict.fromkeys(self.names)]
        self.pieces: list[list[str]] = []
        self.piece_bytes: list[int] = []
        self.notes: list[str] = []
        self.vocabulary: int | None = None
        self.max_seqlen: int | None = None
        if path.input_kind == TEXT:
            of_text: Any = model
            self.max_seqlen = max_seqlen(of_text.config)
            with self.explained("its embedding"):
                self.vocabulary = of_text.get_input_embeddings().weight.shape[0]
        self.outside_bytes = self.quantized_bytes = self.joined_bytes = 0
        inside = {module for block in self.blocks for module in block.modules()}
        self._others = [(name, module) for name, module in model.named_modules() if module not in inside]
        # The slots of each open block, by the block's number; under None the slots outside of the blocks.
        self._open: dict[int | None, list[TensorSlot]] = {}
        self.after_blocks: dict[tuple[torch.Size, ...], Callable[[Tensor], Tensor] | None] = {}
        self._reader = ThreadPoolExecutor(1)
        # The block that is being read ahead.
        self._next: tuple[int, Future[Loadables]] | None = None
        if self.device.type == "cuda":
            # Peaks are those since here.
            torch.cuda.reset_peak_memory_stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._next = None
        # An error may have left blocks open.
        for i in [*self._open]:
            self.close(i)

    def explained(self, place: str) -> AbstractContextManager[None]:
        """Turn any exception of the model's own code inside the `with` block into one line, see `stubs.explained`."""
        return explained(self.class_name, place, self.input_kind)

    def read(self, i: int | None) -> Loadables:
        """Read block i's tensors that are not in memory, by the names of `block_tensors`; i=None: outside of blocks."""
        return {}

    def _make(self, i: int | None, tensors: Loadables) -> MakeTensor:
        """Return a function from a slot of block i to its tensor on the device. `tensors` is a result of `read`."""
        return lambda slot: dequantized(tensors.get(slot.path, slot.own)).detach().to(self.device, copy=True)

    def _slots(self, i: int | None) -> list[TensorSlot]:
        """The slots of all tensors in block i; i=None: outside of the blocks."""
        return slots_of(self._others if i is None else self.blocks[i].named_modules(prefix=self.names[i]))

    def open(self, i: int, prefetch: bool = True) -> nn.Module:
        """Put block i on the device, and check its parameters for NaN and Inf.

        Args:
            i: number of the block.
            prefetch: whether to read the next block in the background.

        Raises:
            InputError: a parameter holds NaN or Inf.
        """
        with self.timeline.span("wait", i):
            # A failed read is tried again.
            ahead, self._next = self._next, None
            tensors = ahead[1].result() if ahead and ahead[0] == i else self._timed_read(i)
        with self.timeline.span("read", i):
            block = self.open_alone(i, tensors)
            for name, parameter in block.named_parameters():
                check_finite(f"{self.names[i]}.{name}", parameter)
        # Frees the pinned memory of this block, so that the next block can be read into it.
        del tensors, ahead
        if not prefetch:
            release_pinned()
        elif i + 1 < len(self.blocks):
            self._next = i + 1, self._reader.submit(self._timed_read, i + 1)
        return block

    def open_alone(self, i: int, tensors: Loadables | None = None) -> nn.Module:
        """Put block i on the device, without the check for NaN, and without reading the next block.

        `tensors` are weights by the names of `block_tensors`; None: the model's own weights.
        """
        self._fill(i, self._timed_read(i) if tensors is None else tensors)
        return self.blocks[i]

    def _fill(self, i: int | None, tensors: Loadables) -> list[TensorSlot]:
        """Put weights into the slots of block i (None: outside of the blocks); return these slots."""
        if i not in self._open:
            self._open[i] = self._slots(i)
        make = self._make(i, tensors)
        fill(self._open[i], lambda slot: computed(make(slot), self.in_fp32))
        return self._open[i]

    def round(self, i: int) -> None:
        """Round the weights of the open block i to the dtypes in which they are written."""
        for slot in self._open[i]:
            x = slot.tensors[slot.name]
            if x.dtype != slot.own.dtype:
                x.detach().copy_(x.to(slot.own.dtype))

    def close(self, i: int | None) -> None:
        """Drop the weights of block i; None: the weights outside of the blocks."""
        if i is None:
            self.after_blocks.clear()
        if i in self._open:
            restore(self._open.pop(i))

    @contextmanager
    def set_aside(self, i: int) -> Iterator[None]:
        """Close block i inside the `with` block; afterwards it has the tensors that it has now."""
        slots = self._open.pop(i, [])
        present = [slot.tensors[slot.name] for slot in slots]
        restore(slots)
        try:
            yield
        finally:
            self.close(i)
            for slot, tensor in zip(slots, present, strict=True):
                slot.tensors[slot.name] = tensor
            if slots:
                self._open[i] = slots

    @contextmanager
    def outside_loaded(self, checked: bool = True) -> Iterator[None]:
        """Load the weights outside of the blocks to the device inside the `with` block.

        These are the embeddings, the final norm and the head. They are checked for NaN and Inf, unless `checked` is
        false. A nested call does nothing.

        Raises:
            InputError: a weight holds NaN or Inf.
        """
        is_nested = None in self._open
        try:
            if not is_nested:
                for slot in self._fill(None, self._timed_read(None)):
                    tensor = slot.tensors[slot.name]
                    if checked and isinstance(tensor, nn.Parameter) and not tensor.is_meta:
                        check_finite(slot.path, tensor)
                # No later tensor is as large as the embeddings, so their pinned memory would not be reused. The checks
                # have waited for the copies from it, so it can be freed.
                release_pinned()
            yield
        finally:
            if not is_nested:
                self.close(None)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Load all weights that the forward needs to the device inside the `with` block, without checks for NaN."""
        with ExitStack() as opened:
            if not self.is_whole:
                opened.enter_context(self.outside_loaded(checked=False))
                for i in self.unique_blocks:
                    opened.callback(self.close, i)
                    self.open_alone(i)
            yield

    @property
    def is_whole(self) -> bool:
        """Whether the model's own weights are all on the device, and need no conversion to fp32."""
        return not any(is_copied(x, self.device, self.in_fp32) for x in self.model.parameters())

    def block_tensors(self, i: int) -> Tensors:
        """The parameters of the open block i on the host, by the names under which they are written.

        Parameters on a GPU are copied, see `to_host`. Opening the block again does not change the returned tensors.
        """
        # The slots are read, since hooks may leave parameters out of `state_dict`.
        parameters = [slot for slot in self._open[i] if isinstance(slot.own, nn.Parameter)]
        # A tensor with several slots is written once.
        first = {id(slot.own): slot for slot in reversed(parameters)}
        tensors = {slot.path: (slot.tensors[slot.name], slot.own.dtype) for slot in reversed(first.values())}
        return {path: to_host(x.detach().to(dtype)) for path, (x, dtype) in tensors.items()}

    def other_tensors(self, names: list[str]) -> Tensors:
        """Read tensors outside of the blocks to the host; see `pieces`."""
        return {}

    def _timed_read(self, i: int | None) -> Loadables:
        with self.timeline.span("read", i, READ):
            return self.read(i)


@contextmanager
def resident(
    model: nn.Module, batch: Batch | None, device: torch.device, in_fp32: InFp32 = computes_in_fp32
) -> Iterator["ResidentModel"]:
    """Let a model in memory run one block at a time inside the `with` block.

    Inside, the model is in evaluation mode, has no cache of keys and values, returns only the outputs that a run needs,
    runs without torch.compile, and multiplies with one matrix at a time. All of this is undone at the end.

    Args:
        model: the model.
        batch: arguments of the model's forward; None: a few tokens, for a model of transformers.
        device: device that the model runs on.
        in_fp32: returns whether a model computes in fp32, see `InFp32`.

    Raises:
        InputError: as `path_through`; or a parameter is no plain tensor, or weights outside of the blocks hold NaN or
            Inf.
    """
    with (
        as_python(),
        asked_for_no_more(model) as set_back,
        attention_by_calls(),
        nullcontext() if batch is None else masks_kept(),
        ResidentModel(model, batch, device, in_fp32, set_back) as opened,
    ):
        yield opened


class ResidentModel(BlockModel):
    """A `BlockModel` in memory. Use `resident`.

    Args:
        model, batch, device, in_fp32: as for `resident`.
        set_back: undoes the run's changes to the model's configs and to its training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch | None,
        device: torch.device,
        in_fp32: InFp32,
        set_back: Callable[[], None],
    ) -> None:
        self.set_back = set_back
        for name, parameter in model.named_parameters():
            # Libraries that quantize or distribute a model have their own classes, which wrap other tensors.
            if is_traceable_wrapper_subclass(parameter):
                kind = type(parameter).__name__
                raise InputError(f"{name}: is quantized or distributed ({kind}); give the model with plain weights")
        dtypes = dict.fromkeys(x.dtype for x in model.parameters())
        slow = next((dtype for dtype in dtypes if in_fp32(dtype, device)), None)
        ready = partial(on_device, device=device, in_fp32=slow is not None)
        given = None if batch is None else batch.to(device, slow is not None)
        path = path_through(model, given, ready, device)
        everything = {slot.path for slot in slots_of(model.named_modules(remove_duplicate=False))}
        super().__init__(model, path, shared_parameters(model, path.order, {}, everything), device, slow is not None)
        self.notes = [f"not pruned: {reason}" for reason in path.passed_over.values()] + self.shared.notes
        self.notes += [arithmetic.note(slow)] if slow else []
        for name, block in zip(self.names, self.blocks, strict=True):
            if found := quantized(block):
                where = f"in {name} and blocks like it"
                self.notes.append(f"kept dense {where}, since they are quantized: {', '.join(found)}")
                break
        prefixes = tuple(f"{name}." for name in self.names)
        others = [(name, x) for name, x in model.named_parameters() if not name.startswith(prefixes)]
        for name, parameter in others:
            check_finite(name, parameter)
        copied = [x.to("meta") for _, x in others if is_copied(x, self.device, self.in_fp32)]
        self.outside_bytes = sum(computed(x, self.in_fp32).nbytes for x in copied)

    def _slots(self, i: int | None) -> list[TensorSlot]:
        slots = super()._slots(i)
        # A block is always copied. Outside of the blocks, tensors on the device are used without a copy.
        return slots if i is not None else [slot for slot in slots if is_copied(slot.own, self.device, self.in_fp32)]

    def changes(self, i: int, tensors: Tensors) -> dict[int, Tensor]:
        """Return the new tensors of block i by the `id` of the caller's own. Shared parameters have not changed."""
        names = tensors.keys() - self.shared.names
        return {id(slot.own): tensors[slot.path] for slot in self._slots(i) if slot.path in names}
