"""Batches: arguments of a model's own forward, for models whose inputs are not tokens."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsefw.arithmetic import computed
from sparsefw.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of one call of a model's forward.

    Attributes:
        args, kwargs: the arguments, which contain tensors.
        windows: number of windows of tokens in the batch; 1 if its arguments are a caller's.
        name: name of a caller's batch for messages, such as "calibration[3]"; "" for windows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    windows: int = 1
    name: str = ""

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def to(self, device: torch.device, in_fp32: bool = False) -> "Batch":
        """Return the batch with its tensors on a device, and with `in_fp32` those of half precision in fp32."""
        return self.map(lambda x: computed(x.to(device), in_fp32))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with each of its tensors changed by a function."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Batch(args, kwargs, self.windows, self.name)


# Name of a caller's batches in place of a text's name.
BATCHES = "batches given in Python"


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a caller. Each is a micro-batch of its own.

    Attributes:
        batches: the batches.
        hash: SHA-256 of the batches, in hex.
        source: name of the batches, for the report.
    """

    batches: list[Batch]
    hash: str
    source: str = BATCHES

    @property
    def n(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def shard(self, share: slice) -> "Batches":
        """Select some of the batches. The hash stays that of all batches."""
        return replace(self, batches=self.batches[share])

    def split(self, size: int) -> Iterator[Batch]:
        """Return the batches one by one; the size plays no part."""
        return iter(self.batches)


def token_batch(ids: Tensor) -> Batch:
    """Make a batch for a language model of windows of tokens (windows, seqlen)."""
    return Batch((), {"input_ids": ids, "use_cache": False}, len(ids))


def batches_of(items: Iterable[Any], argument: str) -> Batches:
    """Make batches of a caller's items.

    Args:
        items: for each batch a mapping of keyword arguments, a tuple or list of positional arguments, or one tensor.
        argument: name of the caller's argument, for messages.

    Raises:
        InputError: there is no item, an item is of another type or has no tensor with entries, or a tensor holds NaN.
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
                digest.update(bytes_of(x))
    return Batches(batches, digest.hexdigest())


def bytes_of(x: Tensor) -> memoryview:
    """Return the bytes of a tensor in memory order, without a copy if it is contiguous and on the host."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
    # Infinity is allowed, since attention masks have it.
    if any(x.is_floating_point() and x.isnan().any() for x in batch.tensors):
        raise InputError(f"{name}: holds NaN")
    # Tensors from inference mode have no version counter, which shows later whether they were written to.
    return batch.map(lambda x: x.clone() if x.is_inference() else x)
