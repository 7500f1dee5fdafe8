"""A checkpoint's model without its weights, and how tensors of the checkpoint get into it.

The model's own class stands there whole at no cost in memory: parameters on the meta device, and real only the buffers
that are computed, not stored (rotary tables, masks). Tensors are loaded when they are needed, a block at a time, and
renamed or stacked on the way as transformers does it for the whole model: so the experts of one block are stacked at a
time, never those of all.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from sparsefw.checkpoint.source import CONFIG, Checkpoint, TensorInfo
from sparsefw.errors import InputError, first_line

# What loading a checkpoint whose config or tensors do not fit can raise.
LOADING = (
    ArithmeticError,
    AssertionError,
    ValueError,
    RuntimeError,
    OSError,
    KeyError,
    AttributeError,
    TypeError,
    ImportError,
    IndexError,
    StrictDataclassError,
)

# Computed buffers of real models take a few MiB; a config that asks for more than its checkpoint's size is no model's.
BUFFERS_ALLOWED = 64 * 2**20


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: the model; its computed buffers are real, on the host.
        goes_into: by the checkpoint's name of a tensor, the parameter that it becomes, or becomes a part of.
        mapping: how transformers renames and stacks.
        dtype: of the model.
        unused: names of tensors that the model has no use for.
    """

    model: nn.Module
    goes_into: dict[str, str]
    mapping: list
    dtype: torch.dtype
    unused: list[str]

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Put tensors of the checkpoint into the parameters that they belong to, as new memory or their own.

        Args:
            tensors: by their names in the checkpoint: all that go into the same parameters.
            device: where the parameters are then.
        """
        info = _load(self.model, tensors, self.dtype, device, self.mapping)
        # Shapes were compared when the skeleton was built.
        assert not info.mismatched_keys, info
        assert not info.conversion_errors, info

    def exported(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by their names in the model, under the checkpoint's names and in its form; on the host."""
        return {k: v.cpu().contiguous() for k, v in revert_weight_conversion(self.model, tensors).items()}


class _Promise:
    """Stands for a tensor of the checkpoint that is not read: where the loading code takes it, it is a meta tensor."""

    def __init__(self, info: TensorInfo):
        self.shape, self.dtype, self.device = torch.Size(info.shape), info.dtype, torch.device("meta")

    def __getitem__(self, index: Any) -> "_Promise":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def build(checkpoint: Checkpoint) -> Skeleton:
    """Build a checkpoint's model from its config, and compare it with the checkpoint's headers; reads no tensor.

    Raises:
        InputError: transformers cannot load it, or tensors are missing or do not fit.
    """
    # One bar for every block otherwise.
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        return _build(checkpoint, config)
    except InputError:
        raise
    except LOADING as error:
        raise InputError(f"{checkpoint.folder}: transformers cannot load this model: {first_line(error)}") from error


def _build(checkpoint: Checkpoint, config: Any) -> Skeleton:
    # Some versions of the fused attention leave a cap on attention logits out without a word.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    options = {
        "dtype": checkpoint.dtype,
        "attn_implementation": "eager" if capped else None,
        # One product per expert, where its inputs can be seen.
        "experts_implementation": "eager",
    }
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    mapping = get_model_conversion_mapping(empty)
    # First where nothing can be allocated: transformers makes up what is missing.
    info = _load(empty, _promises(checkpoint), checkpoint.dtype, torch.device("meta"), mapping)
    empty._adjust_missing_and_unexpected_keys(info)
    _check(info, empty, checkpoint)
    model = type(empty).from_pretrained(None, config=config, state_dict=_promises(checkpoint), **options)
    model.eval().requires_grad_(False)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state, goes_into = model.state_dict(), {}
    for name in checkpoint.tensors:
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new = name
        if new in state:
            goes_into[name] = new
    return Skeleton(model, goes_into, mapping, checkpoint.dtype, sorted(info.unexpected_keys))


def _promises(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: _Promise(tensor) for name, tensor in checkpoint.tensors.items()}


def _load(model: nn.Module, tensors: dict[str, Any], dtype: torch.dtype, device: torch.device, mapping: list) -> Any:
    used = getattr(model, "_weight_conversions", None)
    options = LoadStateDictConfig(
        device_map={"": device}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping
    )
    info, _ = convert_and_load_state_dict_in_model(model, tensors, options)
    # It leaves there what this call used; the way back needs what the whole checkpoint uses.
    if used is not None:
        model._weight_conversions = used
    return info


def _check(info: Any, empty: nn.Module, checkpoint: Checkpoint) -> None:
    if info.conversion_errors:
        name, error = sorted(info.conversion_errors.items())[0]
        raise InputError(f"{name}: cannot be made of the checkpoint's tensors: {first_line(error)}")
    if wrong := sorted(info.mismatched_keys):
        name, found, expected = wrong[0]
        raise InputError(f"{name}: the checkpoint has shape {tuple(found)}, the config asks for {tuple(expected)}")
    # Of tied parameters one is enough.
    tied = [pair for pair in empty.all_tied_weights_keys.items() if not info.missing_keys.issuperset(pair)]
    if missing := sorted(info.missing_keys.difference(*tied)):
        raise InputError(f"{missing[0]}: this tensor is missing from the checkpoint ({len(missing)} in all)")
    size = sum(buffer.nbytes for buffer in empty.buffers())
    if size > BUFFERS_ALLOWED + checkpoint.nbytes:
        raise InputError(f"{checkpoint.folder / CONFIG}: asks for tables of {size / 2**30:.1f} GiB beside the weights")
