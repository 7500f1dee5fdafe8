"""A language model whose weights are in memory only while they are used.

The weights of one block are in memory, or those that text needs outside of the blocks. The next block is read while one
is worked on. All other tensors of the checkpoint are never loaded: a tower for images, blocks that text does not run
through, layers that the model's class has no use for.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.checkpoint import quantization
from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.source import Checkpoint
from sparsefw.checkpoint.tensors import Loadable, QuantizedInfo, TensorInfo, dequantized
from sparsefw.errors import counted
from sparsefw.finite import check_finite
from sparsefw.model import skeleton
from sparsefw.model.explained import TEXT, explained
from sparsefw.model.shared import shared_parameters
from sparsefw.model.slots import Slot, slots_of
from sparsefw.model.stand_ins import kind_of_block
from sparsefw.model.text_path import follow_text
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
        runs: the module whose forward is run: the model, or its text model, see `TextPath`.
        given: what its forward is given, in words.
        blocks: the decoder blocks that text runs through, in the order of their calls.
        names: their names in the model, e.g. "model.layers.0".
        firsts: numbers of the blocks that are called for the first time.
        idle: the blocks that text does not run through, by name. They stay as they are in the checkpoint.
        pieces: names of all tensors outside of `blocks`, as many together as are held in memory anyway.
        outside_bytes: bytes of the parameters outside of the blocks that are loaded.
        shared: parameters of blocks that are one tensor with another parameter.
        max_seqlen: tokens in the longest window that the model takes; None if its config does not say.
        notes: what the user should know of the loading, one line each.
        timeline: receives the time of reading.
        flow: how blocks hand tensors on.
        forms: what blocks return, as far as it is known.

    Raises:
        InputError: transformers cannot load it or run it on text, tensors are missing or do not fit, or no stack of
            blocks is found.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        read: Callable[[dict[str, TensorInfo], bool], Mapping[str, Loadable]] = read_tensors,
        timeline: Timeline | None = None,
    ) -> None:
        self.device, self._checkpoint, self._read_tensors = torch.device(device), checkpoint, read
        self.timeline = timeline or Timeline()
        self._skeleton = skeleton.build(checkpoint)
        self.model = model = self._skeleton.model
        self.max_seqlen = skeleton.max_seqlen(model.config)
        path = follow_text(model, checkpoint.folder)
        self.runs, self.idle, self.given = path.runs, path.idle, TEXT
        self.blocks, self.names = [path.blocks[name] for name in path.order], path.order
        # Where each block is called first.
        self._number = {name: self.names.index(name) for name in path.order}
        self.firsts = list(self._number.values())
        self.shared = shared_parameters(model, self.names, tied_parameters(model), self._skeleton.goes_into.values())
        # The checkpoint's tensors by block; under None those outside of the blocks that are loaded.
        self._tensors_of = self._sorted(path.reads)
        stored = model.state_dict(keep_vars=True)
        # Tied parameters are one tensor.
        self.outside_bytes = sum({id(stored[name]): stored[name].nbytes for name in path.reads}.values())
        self.pieces = self._cut(max(map(self._bytes_of, range(len(self.blocks)))))
        self.notes = self._notes()
        self._stored = {name for name, tensor in stored.items() if tensor.is_meta}
        for buffer in model.buffers():
            if not buffer.is_meta:
                buffer.data = buffer.data.to(self.device)
        self.flow, self.logits_itemsize = path.flow, path.logits_itemsize
        self.forms, self.kinds = path.forms, [kind_of_block(block) for block in self.blocks]
        self._reader = ThreadPoolExecutor(1)
        # The block that is being read before it is asked for.
        self._next: tuple[int, Future[Mapping[str, Loadable]]] | None = None
        # How many `with` blocks of `outside` are open.
        self._outside = 0

    def __enter__(self) -> "StreamedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._next = None

    def read(self, i: int | None) -> Mapping[str, Loadable]:
        """Block i's tensors as they are stored, on the host; None: those outside of the blocks that text needs."""
        return self._read(i, self._tensors_of[i])

    def _read(self, i: int | None, names: Iterable[str]) -> Mapping[str, Loadable]:
        wanted = {name: self.infos[name] for name in names}
        with self.timeline.span("read", i, READ):
            return self._read_tensors(wanted, self.device.type == "cuda")

    def open(self, i: int, ahead: bool = True) -> nn.Module:
        """As `BlockModel.open`."""
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

    def open_alone(self, i: int) -> nn.Module:
        """As `BlockModel.open_alone`."""
        return self.open_as(i, self.read(i))

    def open_as(self, i: int, tensors: Mapping[str, Loadable]) -> nn.Module:
        """Block i on the device with these weights, which have their names in the checkpoint.

        Tensors that it shares with other blocks may be missing. They are never changed, so the checkpoint's are read.
        """
        places, stored = self._skeleton.goes_into, self._checkpoint.tensors
        others = [name for name in self._tensors_of[i] if not places[name].startswith(f"{self.names[i]}.")]
        if missing := {name: stored[name] for name in others if name not in tensors}:
            tensors = {**tensors, **self._read_tensors(missing, False)}
        self._skeleton.load(tensors, self.device)
        self._share(i)
        return self.blocks[i].requires_grad_(False)

    def close(self, i: int) -> None:
        """Drop the weights of block i."""
        self._drop(self.blocks[i].named_modules(prefix=self.names[i]))

    @contextmanager
    def outside(self, without: Collection[str] = ()) -> Iterator[None]:
        """Inside the `with` block, the weights that text needs outside of the blocks are on the device.

        They are embeddings, the final norm and the head.

        Args:
            without: names of tensors of the checkpoint that are not loaded.

        Raises:
            InputError: they hold NaN or Inf.
        """
        self._outside += 1
        try:
            if self._outside == 1:
                if without:
                    names = [name for name in self._tensors_of[None] if name not in without]
                    self._skeleton.load(self._read(None, names), self.device)
                else:
                    self._skeleton.load(self.read(None), self.device)
                    self._tie()
                for name, parameter in self.model.requires_grad_(False).named_parameters():
                    if not parameter.is_meta:
                        check_finite(name, parameter)
                # The embeddings are large, and nothing else is of their size. The checks have waited for the copies.
                give_back_page_locked()
            yield
        finally:
            self._outside -= 1
            if not self._outside:
                inside = {module for block in self.blocks for module in block.modules()}
                self._drop([(name, m) for name, m in self.model.named_modules() if m not in inside])

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """Block i's tensors under the checkpoint's names, on the host."""
        if i not in self.firsts:
            return {}
        state = self.blocks[i].state_dict(prefix=f"{self.names[i]}.")
        own = {name: tensor for name, tensor in state.items() if name not in self.shared.sources}
        tensors = self._skeleton.exported(own)
        # A parameter that is one tensor of the checkpoint may have several names that transformers understands.
        mine, its = self._skeleton.names_of(tensors), self._skeleton.names_of(self._tensors_of[i])
        same = {mine[p][0]: its[p][0] for p in mine if len(mine[p]) == len(its.get(p, ())) == 1}
        return {same.get(name, name): tensor for name, tensor in tensors.items()}

    def other_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors outside of the blocks as they are in the checkpoint, on the host; see `pieces`."""
        read = dict(self._read_tensors({name: self._checkpoint.tensors[name] for name in names}, False))
        # A stored form goes as soon as it is dequantized.
        return {name: dequantized(read.pop(name)) for name in [*read]}

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """All tensors of the checkpoint by name, none of them read."""
        return self._checkpoint.tensors

    def places_of(self, parameter: Tensor) -> list[Slot]:
        """The places of a parameter outside of the blocks: several if it is tied."""
        return [slot for slot in slots_of(self.model.named_modules()) if slot.own is parameter]

    def tensor_of(self, parameter: Tensor) -> str | None:
        """The tensor of the checkpoint that a parameter outside of the blocks is; None: it is not one as it is."""
        paths = {slot.path for slot in self.places_of(parameter)}
        tied = tied_parameters(self.model)
        paths |= {tied[path] for path in paths if path in tied}
        names = [name for name in self._tensors_of[None] if self._skeleton.goes_into[name] in paths]
        return names[0] if len(names) == 1 and self.infos[names[0]].shape == parameter.shape else None

    @property
    def vocabulary(self) -> int:
        """Number of the tokens that the model embeds."""
        with explained(type(self.model).__name__, "its embedding"):
            embeddings: Any = self.model.get_input_embeddings()
            return embeddings.weight.shape[0]

    @property
    def loaded(self) -> list[str]:
        """Names of the checkpoint's tensors that are loaded at some time."""
        return list(dict.fromkeys(name for names in self._tensors_of.values() for name in names))

    @property
    def quantized_bytes(self) -> int:
        """Bytes of quantized tensors as they are stored: the most that are in memory beside what is made of them."""

        def stored(names: Iterable[str]) -> int:
            infos = (self._checkpoint.tensors[name] for name in names)
            return sum(info.stored_nbytes for info in infos if isinstance(info, QuantizedInfo))

        one_by_one = (stored([name]) for piece in self.pieces for name in piece)
        return max(*map(stored, self._tensors_of.values()), *one_by_one)

    @property
    def joined_bytes(self) -> int:
        """Bytes of the largest parameter that is made of several tensors; 0 if there is none."""
        parts = Counter(self._skeleton.goes_into.values())
        return max((x.nbytes for name, x in self.model.named_parameters() if parts[name] > 1), default=0)

    def _sorted(self, reads: frozenset[str]) -> dict[int | None, list[str]]:
        """Names of the checkpoint's tensors by block; under None those of the parameters in `reads`."""
        tensors: dict[int | None, list[str]] = {i: [] for i in (*range(len(self.names)), None)}
        for name, parameter in self._skeleton.goes_into.items():
            places = self.shared.places(parameter)
            for i in {self._block_of(place) for place in places}:
                if i is not None or not reads.isdisjoint(places):
                    tensors[i].append(name)
        return tensors | {i: tensors[self._number[name]] for i, name in enumerate(self.names)}

    def _block_of(self, parameter: str) -> int | None:
        """The number of the block that a parameter belongs to; None if it is outside of the blocks."""
        parts = parameter.split(".")
        places = (".".join(parts[:n]) for n in range(1, len(parts)))
        return next((self._number[place] for place in places if place in self._number), None)

    def _bytes_of(self, i: int | None) -> int:
        return sum(self._checkpoint.tensors[name].nbytes for name in self._tensors_of[i])

    def _cut(self, block_bytes: int) -> list[list[str]]:
        """Cut the list of all tensors outside of the blocks into pieces; `block_bytes` are those of the largest block.

        What text needs is held together in any case. A single tensor may be larger than a piece should be.
        """
        most = max(block_bytes, self._bytes_of(None))
        inside = {name for name, parameter in self._skeleton.goes_into.items() if self._block_of(parameter) is not None}
        pieces: list[list[str]] = []
        size = most
        # First what text needs.
        needed = self._tensors_of[None]
        for name in (*needed, *sorted(self._checkpoint.tensors.keys() - inside.union(needed))):
            size += (nbytes := self._checkpoint.tensors[name].nbytes)
            if size > most or not pieces:
                pieces.append([])
                size = nbytes
            pieces[-1].append(name)
        return pieces

    def _notes(self) -> list[str]:
        tensors, built, kind = self._checkpoint.tensors, self._skeleton, type(self.model).__name__
        needed = {*self._tensors_of[None], *built.unused}
        # By what is said of them: tensors outside of the blocks that are not loaded.
        others = {
            f"{kind} has no use for": built.unused,
            "text does not run through": [name for piece in self.pieces for name in piece if name not in needed],
        }
        notes = [f"config.json names {built.replaced}: pruned as {kind}"] if built.replaced else []
        if self.runs is not self.model:
            notes.append(f"{kind} does not run on text alone: its {type(self.runs).__name__} is run in its place")
        notes += self.shared.notes
        if dequantized := quantization.note(tensors.values(), self._checkpoint.quantization):
            notes.append(dequantized)
        if scales := self._checkpoint.left_out:
            notes.append(f"scales of activations are not written: {len(scales)}, {min(scales)} first")
        if self._checkpoint.config.get("auto_map"):
            notes.append("auto_map is not written: it names code of the checkpoint, which is neither run nor copied")
        for what, names in others.items():
            if names:
                size = sum(tensors[name].nbytes for name in names) / 1e9
                notes.append(f"not pruned: {len(names)} tensors that {what}, {size:.2f} GB, {names[0]} first")
        state = self.model.state_dict()
        changed: dict[torch.dtype, list[str]] = {}
        for name in (name for i in self.firsts for name in self._tensors_of[i]):
            dtype = state[built.goes_into[name]].dtype
            if tensors[name].dtype.is_floating_point and tensors[name].dtype != dtype:
                changed.setdefault(dtype, []).append(name)
        for dtype, names in changed.items():
            notes.append(
                f"read and written as {dtype}: {counted(len(names), 'tensor')} of another dtype, {names[0]} first"
            )
        return notes

    def _share(self, i: int) -> None:
        """Give block i the parameters that it shares, which were loaded in the places of their names."""
        elsewhere = set()
        for name, source in self.shared.sources.items():
            if name.startswith(f"{self.names[i]}."):
                path, _, last = name.rpartition(".")
                self.model.get_submodule(path)._parameters[last] = self.model.get_parameter(source)
                elsewhere.add(source.rpartition(".")[0])
        # The block holds them now. Weights outside of the blocks may be in use.
        inside = tuple(f"{name}." for name in self.names)
        self._drop(
            (path, self.model.get_submodule(path))
            for path in elsewhere
            if not path.startswith(f"{self.names[i]}.") and (path.startswith(inside) or not self._outside)
        )

    def _tie(self) -> None:
        """Make tied parameters outside of the blocks one tensor again.

        A block may be open, and share parameters with others that are not: it keeps those that it has.
        """
        modules = [module for block in self.blocks for module in block.modules()]
        held = [{name: x for name, x in m._parameters.items() if x is not None and not x.is_meta} for m in modules]
        tie_parameters(self.model, self.model.state_dict().keys() - self._skeleton.goes_into.values())
        for module, parameters in zip(modules, held, strict=True):
            module._parameters.update(parameters)

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
