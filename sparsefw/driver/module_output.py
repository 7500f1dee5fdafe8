"""Write a model in memory as its own library does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.slots import filled, slots_of


def check_state(model: nn.Module) -> None:
    """Refuse a model that cannot be written as a safetensors file, and has no library that writes it otherwise.

    Of a model of transformers the library checks the configs when it writes them, which is at the end of a run. So they
    are written once before it.
    """
    if getattr(type(model), "save_pretrained", None) is PreTrainedModel.save_pretrained:
        assert isinstance(model, PreTrainedModel)
        with explained_saving(model), TemporaryDirectory(prefix="sparsefw-") as folder:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
    if hasattr(model, "save_pretrained"):
        return
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name}: is a {type(value).__name__} in the model's state; safetensors files take tensors alone; "
                "prune without output, which changes the model in place, and write it yourself"
            )


def save(model: nn.Module, folder: Path) -> None:
    """Write a model as its own library does, or as a single safetensors file, into an empty folder.

    Raises:
        InputError: the model cannot be written.
    """
    own: Any = getattr(model, "save_pretrained", None)
    # safetensors takes no tensor that is a part of a larger one, as weights in one flat buffer are.
    slots = [] if own else slots_of(model.named_modules())
    parts = [slot for slot in slots if slot.own.untyped_storage().nbytes() > slot.own.nbytes]
    with explained_saving(model), filled(parts, lambda slot: slot.own.detach().clone()):
        if own:
            own(folder)
        else:
            safetensors.torch.save_model(model, str(folder / "model.safetensors"))


@contextmanager
def explained_saving(model: nn.Module) -> Iterator[None]:
    """Turn what a library raises when it cannot write a model, inside the `with` block, into an error of one line.

    Weights that lie in the same memory are one reason: safetensors takes only some of them. A config that its library
    does not take is another, such as a temperature without sampling.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"model: {type(model).__name__} cannot be written: {shown(first_line(error), 600)}") from error
