"""Batches: the arguments of a model's own forward, for models that read something else than tokens."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sparsefw.arithmetic import computed
from sparsefw.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one call of a model's forward.

    Attributes:
        args, kwargs: the arguments, with tensors inside.
        windows: number of windows of tokens in it; 1 if it is none of them.
        name: its name for messages, as "calibration[3]"; "" for windows.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    windows: int = 1
    name: str = ""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def to(self, device: torch.device, in_fp32: bool = False) -> "Batch":
        """The same batch with its tensors on a device, and those of half precision in fp32 if `in_fp32`."""
        return self.map(lambda x: computed(x.to(device), in_fp32))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with other tensors, each made of the one in its place."""
        args, kwargs = tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs))
        return Batch(args, kwargs, self.windows, self.name)


# The name of a caller's batches, where a text has its own.
BATCHES = "batches given in Python"


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches that a caller gives. Each is a micro-batch of its own.

    Attributes:
        batches: the batches.
        hash: SHA-256 of them, in hex.
        source: name of them, for the report.
    """

    batches: list[Batch]
    hash: str
    source: str = BATCHES

    @property
    def n(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def shard(self, share: slice) -> "Batches":
        """Some of the batches; the hash stays that of all."""
        return replace(self, batches=self.batches[share])

    def split(self, size: int) -> Iterator[Batch]:
        """The batches as they are, whatever the size."""
        return iter(self.batches)


def token_batch(ids: Tensor) -> Batch:
    """Windows of tokens (windows, seqlen) as a batch of a language model."""
    return Batch((), {"input_ids": ids, "use_cache": False}, len(ids))


def batches_of(items: Iterable[Any], argument: str) -> Batches:
    """A caller's batches.

    Args:
        items: for each batch a mapping of keyword arguments, a tuple or list of positional ones, or a single tensor.
        argument: name of the caller's argument, for messages.

    Raises:
        InputError: there is none, one is something else or has no tensor or empty ones only, or a tensor holds NaN.
    """
    if isinstance(items, str | bytes | Mapping | Tensor) or not isinstance(items, Iterable):
        raise InputError(
            f"{argument}: got {type(items).__name__}, expected a list, a generator or a DataLoader of batches; "
            "texts and tokens go into dataset"
        )
    batches = [_batch_of(item, f"{argument}[{n}]") for n, item in enumerate(items)]
    if not batches:
        raise InputError(f"{argument}: there is no batch")
    digest = hashlib.sha256()
    for batch in batches:
        for x in tree_leaves((batch.args, sorted(batch.kwargs.items()))):
            what = f"{x.dtype}{tuple(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__}{x!r}"
            digest.update(what.encode())
            if isinstance(x, Tensor):
                digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return Batches(batches, digest.hexdigest())


def _batch_of(item: Any, name: str) -> Batch:
    if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
        batch = Batch((), dict(item), name=name)
    elif isinstance(item, tuple | list | Tensor):
        batch = Batch((item,) if isinstance(item, Tensor) else tuple(item), name=name)
    else:
        raise InputError(
            f"{name}: expected the arguments of the model's forward, as a mapping by name, a tuple or a tensor; got "
            f"{type(item).__name__}; texts go into dataset, or through the model's tokenizer"
        )
    if not any(x.numel() for x in batch.tensors):
        held = ", ".join(dict.fromkeys(type(x).__name__ for x in (*batch.args, *batch.kwargs.values()))) or "nothing"
        raise InputError(f"{name}: holds {held}, and no tensor with entries; a DataLoader makes batches of tensors")
    # Infinity is all right: masks have it.
    if any(x.is_floating_point() and bool(x.isnan().any()) for x in batch.tensors):
        raise InputError(f"{name}: holds NaN")
    # Tensors that were made in inference mode do not tell when they are written to.
    return batch.map(lambda x: x.clone() if x.is_inference() else x)
