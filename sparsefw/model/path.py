"""Find the path of a model's own forward: its blocks, in the order of their calls, and the tensors between them.

A model may have parts that text does not use: a vision or audio encoder, blocks that read its output, layers that
predict further tokens. So the forward runs on a few tokens, or on a batch of the caller, and shows which parts it uses.
No architecture is named here. A path may lead through several lists of blocks, such as an encoder and a decoder.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.arithmetic import computed
from sparsefw.data.batches import Batch, token_batch
from sparsefw.errors import InputError
from sparsefw.model.layers import QUANTIZED, quantized
from sparsefw.model.nested import objects_of, rebuilt
from sparsefw.model.stubs import (
    BATCHES,
    TEXT,
    ForwardFailed,
    MakeStub,
    NotABlock,
    Templates,
    block_type,
    explained,
    run_with_stubs,
)
from sparsefw.model.swap import filled, slots_of
from sparsefw.model.tape import tensors_in
from sparsefw.model.trace import Trace
from sparsefw.model.tracer import Tracer

# The input that shows the path on text. Eight tokens are enough for every kind of attention.
FEW_TOKENS = token_batch(torch.zeros(1, 8, dtype=torch.int64))

# Types of modules whose weights are not pruned.
_NO_LAYERS = (nn.Embedding, nn.modules.conv._ConvNd)

# Functions that read only a tensor's metadata. The device is not among them: a tensor has the right one only if loaded.
_METADATA = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad", "is_meta")}
_METADATA |= {Tensor.size, Tensor.dim, Tensor.numel}

# Called with modules; inside the `with` block of what it returns, the modules can run.
Ready = Callable[[Iterable[nn.Module]], AbstractContextManager[None]]

# Lists of modules that may be blocks, by the name of the list. A list maps names in the model to modules.
Stacks = dict[str, dict[str, nn.Module]]


@dataclass(frozen=True)
class Path:
    """The path of a forward through a model.

    Attributes:
        runs: the module whose forward runs: the model, or its text model if the model does not run on text alone.
        input_kind: the kind of input in words, `TEXT` or `BATCHES`.
        blocks: the blocks by name.
        order: names of the blocks in the order of their calls. A block that is called twice is listed twice.
        unused: blocks of the same lists that the forward does not call, or with quantized matrices only, by name.
        reads: names of all parameters and stored buffers that the forward reads outside of the blocks. A tied tensor is
            listed under all its names.
        flow: the trace of the forward.
        templates: what blocks of each type return.
        logits_itemsize: bytes of an entry of the logits; 0 if the model returns no logits.
        passed_over: maps the name of a list whose modules are no blocks to the reason.
    """

    runs: nn.Module
    input_kind: str
    blocks: dict[str, nn.Module]
    order: list[str]
    unused: dict[str, nn.Module]
    reads: frozenset[str]
    flow: Trace
    templates: Templates
    logits_itemsize: int
    passed_over: dict[str, str] = field(default_factory=dict)


def path_through(model: nn.Module, batch: Batch | None, ready: Ready, device: torch.device) -> Path:
    """Find the path of a batch through a model.

    Args:
        model: the model.
        batch: arguments of the model's forward; None: a few tokens. If the model's forward fails on a few tokens, the
            forward of a text model inside the model is taken.
        ready: makes modules ready to run: those outside of the blocks, or those of a block.
        device: device of the few tokens, and of the tensors in modules that are ready.

    Raises:
        InputError: the model has no list of blocks, the forward fails, or tensors between blocks cannot be traced.
    """
    if batch is not None:
        return _path(model, model, batch, BATCHES, ready)
    inner = (m for m in model.modules() if m is not model and isinstance(m, PreTrainedModel))
    failed: InputError | None = None
    for runs in (model, *(m for m in inner if m.get_output_embeddings() is not None)):
        try:
            return _path(model, runs, FEW_TOKENS.to(device), TEXT, ready)
        except InputError as error:
            failed = failed or error
            if not isinstance(error, ForwardFailed):
                # The forward ran, and was refused for what it does. Then no text model is tried in its place.
                break
    assert failed is not None
    raise failed


def _path(model: nn.Module, runs: nn.Module, batch: Batch, input_kind: str, ready: Ready) -> Path:
    passed_over: dict[str, str] = {}
    while stacks := _stacks(model, passed_over):
        try:
            path = _Forward(runs, stacks, batch, input_kind, ready).path(model)
        except NotABlock as error:
            # This list holds no blocks. The next pass looks for lists inside of its modules.
            passed_over[next(name for name, stack in stacks.items() if error.name in stack)] = str(error)
            continue
        if path is None:
            break
        return replace(path, passed_over=passed_over)
    if passed_over:
        raise InputError(next(iter(passed_over.values())))
    raise InputError(
        f"unsupported model {type(model).__name__}: its forward on {input_kind} calls no modules of a ModuleList or "
        f"Sequential that contain weight matrices{'; the model is quantized' if quantized(model) else ''}"
    )


def _stacks(model: nn.Module, passed_over: dict[str, str]) -> Stacks:
    """Find the outermost lists of modules that may be blocks."""
    found: Stacks = {}
    inside = set[nn.Module]()
    for name, module in model.named_modules():
        if module in inside or name in passed_over or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        stack = {
            f"{name}.{n}".removeprefix("."): child
            for n, child in module.named_children()
            if _may_be_block(child) or quantized(child)
        }
        if stack:
            found[name] = stack
            inside.update(module.modules())
    return found


def _may_be_block(module: nn.Module) -> bool:
    """Whether a module has submodules, and contains a weight matrix."""
    owners = (m for m in module.modules() if not isinstance(m, _NO_LAYERS))
    parameters = (x for m in owners for x in m.parameters(recurse=False))
    return any(module.children()) and any(x.dim() in (2, 3) and x.dtype not in QUANTIZED for x in parameters)


class _Forward:
    """A model's own forward, with stubs for the blocks.

    Args:
        runs: the module whose forward runs.
        stacks: lists of modules that may be blocks.
        batch: the arguments of the forward.
        input_kind: the kind of input in words, for messages.
        ready: as for `path_through`.
    """

    def __init__(self, runs: nn.Module, stacks: Stacks, batch: Batch, input_kind: str, ready: Ready) -> None:
        self._runs, self._kind, self._stacks = runs, type(runs).__name__, stacks
        self._batch, self._input_kind, self._ready = batch, input_kind, ready
        # A block whose matrices are all quantized runs as a part of what is around blocks.
        self._blocks = {n: block for stack in stacks.values() for n, block in stack.items() if _may_be_block(block)}
        self._templates = Templates()
        # The attributes of the blocks' modules before the blocks ran, to be restored afterwards.
        self._before: dict[nn.Module, dict[str, Any]] = {}

    @torch.no_grad()
    def path(self, model: nn.Module) -> Path | None:
        """Run the forward, and find its path; None if the forward calls no block.

        The first block of each type really runs, and shows what blocks of this type return. A block that gets objects
        as arguments also runs, since it may change them. Stubs replace all other blocks. Then the forward runs again,
        with other values in the stubs. The forward is refused unless both runs make the same calls.

        Args:
            model: the whole model.

        Raises:
            NotABlock: the first argument of a supposed block is not a tensor.
            InputError: the forward fails, or its tensors between blocks cannot be traced.
        """
        in_blocks = {module for block in self._blocks.values() for module in block.modules()}
        with self._ready(module for module in model.modules() if module not in in_blocks):
            slots = slots_of(model.named_modules(remove_duplicate=False))
            stored = {slot.path: id(slot.own) for slot in slots if not slot.own.is_meta}
            weights = {f"{name}.{inner}": x for name, m in self._blocks.items() for inner, x in m.named_parameters()}
            first = _Reads(self._kind, self._batch.tensors, weights, {*stored.values()})
            second = Tracer(self._kind, self._batch.tensors, weights)
            try:
                returned = self._run(self._run_block, first)
            finally:
                for module, attributes in self._before.items():
                    vars(module).clear()
                    vars(module).update(attributes)
            if not (names := first.names):
                return None
            try:
                self._run(partial(self._run_block, again=True), second)
                same = second.summary() == first.summary()
            except ForwardFailed:
                same = False
            if not same:
                # For example, the forward computes a tensor from blocks' outputs without torch functions, or from
                # objects that blocks change. A trace would take this tensor for a constant.
                raise InputError(
                    f"unsupported model {self._kind}: what its forward does around its blocks depends on the blocks' "
                    "outputs in a way that cannot be followed, or on chance"
                )
            if not any(count == 1 for count in Counter(names).values()):
                raise InputError(
                    f"unsupported model {self._kind}: {names[0]} runs more than once in a forward, and so do all blocks"
                )
            trace = first.trace()
        logits = getattr(returned, "logits", None)
        windows_first = self._input_kind != TEXT or trace.hidden.shape[:2] == FEW_TOKENS.tensors[0].shape
        return Path(
            runs=self._runs,
            input_kind=self._input_kind,
            blocks={name: self._blocks[name] for name in names},
            order=names,
            unused={
                name: block
                for stack in self._stacks.values()
                if not stack.keys().isdisjoint(names)
                for name, block in stack.items()
                if name not in names
            },
            reads=frozenset(name for name, key in stored.items() if key in first.read),
            # The constants belong to a few tokens only, and may be copies of weights.
            flow=replace(trace, constants={}, windows_first=windows_first),
            templates=self._templates,
            logits_itemsize=logits.element_size() if isinstance(logits, Tensor) else 0,
        )

    def _run(self, make_stub: MakeStub, tracer: Tracer) -> Any:
        """Run the forward."""
        return run_with_stubs(self._runs, self._blocks, self._batch, self._input_kind, make_stub, tracer)

    def _run_block(self, i: int, name: str, args: tuple, kwargs: dict, again: bool = False) -> Any:
        """Make the stub for a block's output. If there are objects among the arguments, the block runs on them.

        In the second forward (`again`) the stub has other values, and the block does not run.
        """
        block, objects = self._blocks[name], objects_of((*args, *kwargs.values()))
        kind = block_type(block)
        template = self._templates.find(kind, args[0])
        if template is None or (objects and not again):
            # The block gets the objects themselves, so that its changes show, but copies of the traced tensors.
            memo = {id(known): (known, known) for known in objects}
            own, others = rebuilt((args, kwargs), Tensor.detach, memo)
            self._before = {module: dict(vars(module)) for module in block.modules()} | self._before
            with explained(self._kind, name, self._input_kind), self._ready(block.modules()):
                output = block(*own, **others)
            template = template or self._templates.add(kind, output, own[0], name, self._kind)
        return template.after(args[0], _other_values if again else Tensor.detach)


class _Reads(Tracer):
    """A tracer that notes which tensors the forward reads.

    Args:
        model, arguments, weights: as for `Tracer`.
        watched: ids of the watched tensors.

    Attributes:
        read: ids of the watched tensors that a torch function has read, inside or outside of blocks.
    """

    def __init__(self, model: str, arguments: list[Tensor], weights: Mapping[str, Tensor], watched: set[int]) -> None:
        super().__init__(model, arguments, weights)
        self._watched, self.read = watched, set[int]()

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call, and record it."""
        if func not in _METADATA:
            self.read |= self._watched.intersection(map(id, tensors_in((args, kwargs))))
        return super().record(func, args, kwargs)


def _other_values(x: Tensor) -> Tensor:
    """A tensor of the same shape and dtype with other values. Integers are reversed, and so stay valid indices."""
    if not (x.is_floating_point() or x.is_complex()):
        return x.flip(tuple(range(x.dim())))
    return torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype)


def zeros_in(modules: Iterable[nn.Module], in_fp32: bool) -> AbstractContextManager[None]:
    """Give modules zeros in place of tensors on the meta device inside the `with` block; tied tensors stay tied.

    All zeros are views of one allocation of the size of the largest tensor. Nothing writes to it, so the operating
    system assigns no physical memory.
    """
    slots = [slot for slot in slots_of(("", module) for module in modules) if slot.own.is_meta]
    metas = {slot: computed(slot.own, in_fp32) for slot in slots}
    memory = torch.from_numpy(np.zeros(max((x.nbytes for x in metas.values()), default=0), np.uint8))
    return filled(slots, lambda slot: memory[: metas[slot].nbytes].view(metas[slot].dtype).view(slot.own.shape))
