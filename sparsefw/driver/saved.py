"""Write a model in memory as its own library does, and see whether the pruned layers are in the files."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.slots import filled, slots_of
from sparsefw.model.transformers_private import written_parameters


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


def save(model: nn.Module, folder: Path, layers: Mapping[str, Tensor] | None = None) -> None:
    """Write a model as its own library does, or as a single safetensors file.

    Args:
        model: the model.
        folder: an empty folder.
        layers: the parameters of the pruned layers, by the layers' names: all must be in the files.

    Raises:
        InputError: the library refuses the model, or leaves out a layer.
    """
    own: Any = getattr(model, "save_pretrained", None)
    if own is None:
        _save_as_one_file(model, folder)
        return
    with explained_saving(model):
        own(folder)
    _check_written(model, folder, layers or {})


def _save_as_one_file(model: nn.Module, folder: Path) -> None:
    # safetensors takes no tensor that is a part of a larger one, as weights in one flat buffer are.
    parts = [slot for slot in slots_of(model.named_modules()) if slot.own.untyped_storage().nbytes() > slot.own.nbytes]
    with explained_saving(model), filled(parts, lambda slot: slot.own.detach().clone()):
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


def _check_written(model: nn.Module, folder: Path, layers: Mapping[str, Tensor]) -> None:
    """Refuse files that lack a layer, as those of a library that writes what was trained last, and no more.

    Names tell, in safetensors files; there may be others, which are not looked into.
    """
    written = set[str]()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            written.update(file.keys())
    known = written_parameters(model, written) if isinstance(model, PreTrainedModel) else set()
    if not written or known is None:
        return
    names: dict[int, set[str]] = defaultdict(set)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].add(name)
    # A library may write a part of the model by itself, or the model as a part of another: names are shorter or longer.
    ends = known | {end for name in written for end in _ends(name)}
    for layer, parameter in layers.items():
        called = names[id(parameter)] or {layer}
        if ends.isdisjoint(called) and written.isdisjoint(end for name in called for end in _ends(name)):
            raise InputError(
                f"{layer}: in no file that {type(model).__name__}.save_pretrained has written; prune without output, "
                "which changes the model in place, and write it yourself"
            )


def _ends(name: str) -> Iterable[str]:
    """A tensor's name, and the same without the first modules."""
    parts = name.split(".")
    return (".".join(parts[n:]) for n in range(max(1, len(parts) - 1)))
