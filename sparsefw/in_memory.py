"""Models in memory: pruned through a checkpoint in a temporary folder, with their layers changed in place."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsefw import checkpoint, data
from sparsefw.errors import InputError

# The index of an expert that is a slice of a stacked parameter.
_INDEX = re.compile(r"\[\d+\]$")


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as a checkpoint.

    Raises:
        InputError: it is no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model: expected a folder, a Hub id or a transformers model, got {type(model).__name__}")
    model.save_pretrained(folder)


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside the checkpoint that a model was loaded from.

    Raises:
        InputError: there is none.
    """
    try:
        if model.name_or_path:
            return data.load_tokenizer(checkpoint.locate(model.name_or_path))
    except InputError as error:
        raise InputError(f"tokenizer: the model in memory has none ({error}); give tokenizer=") from error
    raise InputError("tokenizer: the model in memory was not loaded from a checkpoint that has one; give tokenizer=")


@torch.no_grad()
def load_layers(model: PreTrainedModel, folder: Path, layers: Iterable[str]) -> None:
    """Copy layers of a pruned checkpoint into a model; all its other parameters stay as they are.

    Args:
        model: the model that `save` wrote.
        folder: of the pruned checkpoint.
        layers: names of the layers that were pruned, in the model of the checkpoint.

    Raises:
        InputError: the model has no such parameter.
    """
    pruned = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).named_parameters())
    own = dict(model.named_parameters())
    for name in dict.fromkeys(_INDEX.sub("", layer) for layer in layers):
        # A model without its head has no prefix either.
        parameter = own.get(name, own.get(name.removeprefix(f"{model.base_model_prefix}.")))
        if parameter is None or parameter.shape != pruned[name].shape:
            raise InputError(f"model: it has no parameter {name} as its checkpoint has; load the pruned checkpoint")
        parameter.copy_(pruned[name])
