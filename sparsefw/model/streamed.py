"""A checkpoint's model, whose weights are in memory only while they are used.

The model never loads tensors that text does not need: a vision encoder, blocks that text does not run through, tensors
that the model's class does not use.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sparsefw import arithmetic
from sparsefw.arithmetic import computed
from sparsefw.checkpoint import quantization
from sparsefw.checkpoint.source import Checkpoint
from sparsefw.checkpoint.tensors import Infos, Loadables, Tensors, dequantized, read_tensors
from sparsefw.errors import counted
from sparsefw.model import skeleton
from sparsefw.model.block_model import BlockModel
from sparsefw.model.path import path_through, zeros_in
from sparsefw.model.swap import MakeTensor, TensorSlot, block_of, shared_parameters


class StreamedModel(BlockModel):
    """A checkpoint's model that is loaded block by block.

    Args:
        checkpoint: from `sparsefw.checkpoint.inspect`.
        device: device that the model runs on.
        read: reads tensors of the checkpoint, into pinned memory if its second argument is true.
        in_fp32: as for `BlockModel`.

    Attributes:
        infos: headers of all tensors of the checkpoint, by name.

    Raises:
        InputError: transformers cannot load the model or run it on text, tensors are missing or have wrong shapes, or
            the model has no list of blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        read: Callable[[Infos, bool], Loadables] = read_tensors,
        in_fp32: bool = False,
    ) -> None:
        self._read_tensors, self._skeleton = read, skeleton.build(checkpoint)
        self.infos = self._skeleton.checkpoint.tensors
        model, goes_into = self._skeleton.model, self._skeleton.goes_into
        _change_buffers(model, lambda x: computed(x, in_fp32))
        zeros = partial(zeros_in, in_fp32=in_fp32)
        path = path_through(model, None, zeros, torch.device("cpu"))
        shared = shared_parameters(model, path.order, model.all_tied_weights_keys, goes_into.values())
        super().__init__(model, path, shared, device, in_fp32)
        _change_buffers(model, lambda x: x.to(self.device))
        # The skeleton's tensors by name. All names of a tied parameter map to one tensor.
        self._own = model.state_dict(keep_vars=True)
        reads = path.reads & self._own.keys()
        outside = {id(self._own[name]): computed(self._own[name], in_fp32).nbytes for name in reads}
        self.outside_bytes = sum(outside.values())
        # Names of the checkpoint's tensors by block; under None the loaded tensors outside of the blocks.
        self._tensors: dict[str | None, list[str]] = defaultdict(list)
        for name, parameter in goes_into.items():
            # All parameters that the tensor is loaded into.
            places = [parameter, *(place for place, source in shared.sources.items() if source == parameter)]
            for block in {block_of(place, path.blocks) for place in places}:
                if block is not None or not reads.isdisjoint(places):
                    self._tensors[block].append(name)
        self.pieces = self._cut()
        self.piece_bytes = [sum(self.infos[name].nbytes for name in piece) for piece in self.pieces]
        self.quantized_bytes = self._find_quantized_bytes()
        parts = Counter(goes_into.values())
        self.joined_bytes = max((x.nbytes for name, x in model.named_parameters() if parts[name] > 1), default=0)
        self.notes = [*self._notes()]

    def read(self, i: int | None) -> Loadables:
        """Read block i's stored tensors to the host; None: the tensors that text needs outside of the blocks."""
        return self._read_tensors({name: self.infos[name] for name in self.tensors_of(i)}, self.device.type == "cuda")

    def _slots(self, i: int | None) -> list[TensorSlot]:
        # Computed buffers are in memory already, and need not be loaded.
        return [slot for slot in super()._slots(i) if slot.path in self._own and slot.own.is_meta]

    def _make(self, i: int | None, tensors: Loadables) -> MakeTensor:
        goes_into = self._skeleton.goes_into
        # `tensors` may lack parameters that the block shares with other modules. Pruning never changes these, so the
        # checkpoint's tensors are read.
        inside = "" if i is None else f"{self.names[i]}."
        shared = [name for name in self.tensors_of(i) if not goes_into[name].startswith(inside)]
        if missing := {name: self.infos[name] for name in shared if name not in tensors}:
            tensors = {**tensors, **self._read_tensors(missing, False)}
        values = self._skeleton.load(tensors, self.device)
        # The values by the id of the skeleton's tensor: `values` may have only one name of a tied parameter.
        of_tied = {id(self._own[name]): value for name, value in values.items()}
        values |= {name: values[source] for name, source in self.shared.sources.items() if source in values}

        return lambda slot: values.get(slot.path, of_tied.get(id(self._own[slot.path]), slot.own))

    def block_tensors(self, i: int) -> Tensors:
        """As `BlockModel.block_tensors`, with the checkpoint's names and layout (e.g. one tensor for each expert)."""
        state = self.blocks[i].state_dict(prefix=f"{self.names[i]}.")
        sources = self.shared.sources
        own = {name: x.to(self._own[name].dtype) for name, x in state.items() if name not in sources}
        tensors = self._skeleton.exported(own)
        # transformers may export a tensor under another name than the checkpoint has for it. The checkpoint's name is
        # taken if the parameter is a single tensor in both.
        exported, stored = self._skeleton.names_of(tensors), self._skeleton.names_of(self.tensors_of(i))
        same = {exported[p][0]: stored[p][0] for p in exported if len(exported[p]) == len(stored.get(p, ())) == 1}
        return {same.get(name, name): tensor for name, tensor in tensors.items()}

    def other_tensors(self, names: Iterable[str]) -> Tensors:
        """Read tensors outside of the blocks to the host, dequantized, by the checkpoint's names; see `pieces`."""
        read = dict(self._read_tensors({name: self.infos[name] for name in names}, False))
        # `pop` frees the quantized tensor as soon as it is dequantized.
        return {name: dequantized(read.pop(name)) for name in [*read]}

    def tensors_of(self, i: int | None) -> list[str]:
        """Names of the checkpoint's tensors that block i needs; None: those that text needs outside of the blocks."""
        return self._tensors[None if i is None else self.names[i]]

    def _cut(self) -> list[list[str]]:
        """Cut the list of all tensors outside of the blocks into pieces.

        A piece has at most the bytes of the largest block, or of all tensors that text needs outside of the blocks,
        whichever is more: memory has to hold each of these anyway. A single larger tensor is a piece.
        """
        most, size = max(sum(self.infos[name].nbytes for name in names) for names in self._tensors.values()), 0
        blocks, needed = frozenset(self.names), self.tensors_of(None)
        inside = {name for name, parameter in self._skeleton.goes_into.items() if block_of(parameter, blocks)}
        pieces: list[list[str]] = [[]]
        # First the tensors that text needs.
        for name in (*needed, *sorted(self.infos.keys() - inside.union(needed))):
            nbytes = self.infos[name].nbytes
            if pieces[-1] and size + nbytes > most:
                pieces.append([])
                size = 0
            pieces[-1].append(name)
            size += nbytes
        return pieces

    def _find_quantized_bytes(self) -> int:
        """Peak bytes of stored tensors that are in memory together with the tensors made from them."""
        # Sets of tensors that are converted together. Tensors of `pieces` are dequantized one at a time.
        together = [*self._tensors.values(), *([name] for piece in self.pieces for name in piece)]
        stored = {name: x.stored_nbytes for name, x in self.infos.items() if x.dequantize}
        if self.in_fp32:
            stored = {name: stored.get(name, 0) + x.nbytes for name, x in self.infos.items()}
        return max(sum(stored.get(name, 0) for name in names) for names in together)

    def _notes(self) -> Iterator[str]:
        """What the user should know: how the model runs, and which tensors are not pruned or change their dtype."""
        built, kind, infos = self._skeleton, self.class_name, self.infos
        source, unused = built.checkpoint, built.unused
        if built.replaced:
            yield f"config.json names {built.replaced}: pruned as {kind}"
        if self.runs is not self.model:
            yield f"{kind} does not run on text alone: only its text model {type(self.runs).__name__} runs"
        yield from self.shared.notes
        if self.in_fp32:
            yield arithmetic.note(source.dtype)
        if dequantized := quantization.note(infos.values(), source.quantization):
            yield dequantized
        if source.config.get("auto_map"):
            yield "auto_map is not written: it names code in the checkpoint, and this code is neither run nor copied"
        loaded = {*self.tensors_of(None), *unused}
        others = [name for piece in self.pieces for name in piece if name not in loaded]
        for why, names in ((f"{kind} has no use for", unused), ("text does not run through", others)):
            if names:
                size = sum(infos[name].nbytes for name in names) / 1e9
                yield f"not pruned: {len(names)} tensors that {why}, {size:.2f} GB, {names[0]} first"
        changed: dict[torch.dtype, list[str]] = {}
        for name in (name for i in self.unique_blocks for name in self.tensors_of(i)):
            dtype = self._own[built.goes_into[name]].dtype
            if infos[name].dtype.is_floating_point and infos[name].dtype != dtype:
                changed.setdefault(dtype, []).append(name)
        for dtype, names in changed.items():
            yield f"read and written as {dtype}: {counted(len(names), 'tensor')} of another dtype, {names[0]} first"


def _change_buffers(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the data of a model's computed buffers."""
    for buffer in model.buffers():
        if not buffer.is_meta:
            buffer.data = change(buffer.data)
