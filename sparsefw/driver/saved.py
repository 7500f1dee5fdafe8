"""Write a model in memory as its own library does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.slots import filled, slots_of


def save(model: nn.Module, folder: Path) -> None:
    """Write a model as its own library does, or as a single safetensors file.

    Raises:
        InputError: that refuses the model.
    """
    own: Any = getattr(model, "save_pretrained", None)
    if own is not None:
        with explained_saving(model):
            own(folder)
        return
    # safetensors takes no tensor that is a part of a larger one, as weights in one flat buffer are.
    parts = [slot for slot in slots_of(model.named_modules()) if slot.own.untyped_storage().nbytes() > slot.own.nbytes]
    with explained_saving(model), filled(parts, lambda slot: slot.own.detach().clone()):
        safetensors.torch.save_model(model, str(folder / "model.safetensors"))


@contextmanager
def explained_saving(model: nn.Module) -> Iterator[None]:
    """Turn what a library raises when it cannot write a model, inside the `with` block, into an error of one line.

    Weights that lie in the same memory are one reason: safetensors takes only some of them.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(f"model: {type(model).__name__} cannot be written: {shown(first_line(error), 600)}") from error
