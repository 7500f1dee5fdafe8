"""Every private or undocumented name of transformers that the models need, and what each is expected to do.

transformers may change these in any version. They were tested with 5.17 to 5.24; when a later version breaks one, this
file is the place to mend it.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto import modeling_auto

# How one or several tensors of a checkpoint are renamed, stacked or split on their way into a model.
Conversion = WeightTransform

# The lists of classes that generate text, by type of config. Where no class is named, the first that has one counts.
_GENERATING = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")


class LoadReport(Protocol):
    """What transformers reports after loading.

    Attributes:
        missing_keys: parameters that no tensor went into.
        unexpected_keys: tensors that went nowhere.
        mismatched_keys: (parameter, shape in the checkpoint, shape in the model).
        conversion_errors: what went wrong, by parameter.
    """

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, Any, Any]]
    conversion_errors: dict[str, Any]


class PromisedTensor:
    """Stands for a tensor of the checkpoint that is not read.

    transformers loads a slice of a safetensors file by its shape and dtype, `slice[...]` and `.to(device, dtype)`. Here
    that gives a meta tensor.
    """

    def __init__(self, shape: Iterable[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device("meta")

    def __getitem__(self, index: Any) -> "PromisedTensor":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """A meta tensor, whatever the device."""
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def generating_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that the config names, if it is in a list of those that generate text, and takes it.

    Otherwise the class that the lists have for this type of config; None if they have none. The config of an encoder
    and a decoder has to name its class, and the class has to be in the first list: there are decoders in it that run
    alone. Another one's decoder would be pruned without what it reads of the encoder.
    """
    lists = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING") for task in _GENERATING]
    lists = lists[:1] if config.is_encoder_decoder else lists
    # A list has a name, or several, for every type of model.
    listed = [entry for classes in lists for entry in classes._model_mapping.values()]
    known = {name for entry in listed for name in ([entry] if isinstance(entry, str) else entry)}
    taken = {type(config), type(config.get_text_config())}
    for name in config.architectures or []:
        if isinstance(name, str) and name in known:
            kind = getattr(transformers, name)
            if getattr(kind, "config_class", None) in taken:
                return kind
    for classes in [] if config.is_encoder_decoder else lists:
        if found := classes.get(type(config), None):
            return found[0] if isinstance(found, tuple | list) else found
    return None


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that the config names, whatever it is made for, if it takes this type of config."""
    for name in config.architectures or []:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class is type(config):
            return kind
    return None


def has_class(names: object) -> bool:
    """Whether transformers has a class of one of the names that a config lists."""
    listed = names if isinstance(names, list) else []
    return any(isinstance(name, str) and isinstance(getattr(transformers, name, None), type) for name in listed)


def from_config(kind: type[PreTrainedModel], config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of this class without weights, on torch's default device."""
    return kind._from_config(config, **options)


def from_promises(
    kind: type[PreTrainedModel], config: PretrainedConfig, promises: dict[str, PromisedTensor], **options: Any
) -> PreTrainedModel:
    """A model of this class whose parameters are as promised; other buffers are computed.

    Not by a method of the class itself: those that have one look for more files, and ask the Hub for them.
    """
    return PreTrainedModel.from_pretrained.__func__(kind, None, config=config, state_dict=promises, **options)  # type: ignore[attr-defined]


def conversions_of(model: PreTrainedModel) -> list[Conversion]:
    """How tensors of a checkpoint get into a model of this class; e.g. experts are stacked."""
    return get_model_conversion_mapping(model)


def load_tensors(
    model: PreTrainedModel,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    conversions: list[Conversion],
) -> LoadReport:
    """Convert tensors and put them into a model, as `from_pretrained` does.

    Args:
        model: the model, whose other parameters stay as they are.
        tensors: tensors of the checkpoint, or what is loaded like a `PromisedTensor`, by name: all those of the
            parameters that they go into.
        dtype: dtype for the parameters.
        device: device for the parameters.
        conversions: see `conversions_of`.

    Raises:
        OutOfMemoryError: the GPU's memory is full.
        MemoryError: that of the host is.
    """
    conversions_of_all = getattr(model, "_weight_conversions", None)
    options = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        # Its annotation names two of the subclasses, and it takes all.
        weight_mapping=conversions,  # type: ignore[arg-type]
    )
    # It lists all parameters of the model. Whoever watches for one that is read would take that for reading.
    with torch._C.DisableTorchFunction():
        report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), options)
    # Loading replaces these conversions by those of the loaded tensors. `export_tensors` needs those of all tensors.
    if conversions_of_all is not None:
        model._weight_conversions = conversions_of_all
    _raise_for_memory(report.conversion_errors.values())
    return report


def _raise_for_memory(tracebacks: Iterable[str]) -> None:
    """Raise what transformers has caught while it joined tensors, if memory was full."""
    for text in tracebacks:
        if "OutOfMemoryError" in text:
            raise torch.OutOfMemoryError(next(line for line in text.splitlines() if "OutOfMemoryError" in line))
        if "MemoryError" in text or "DefaultCPUAllocator" in text:
            raise MemoryError


def forgive(model: PreTrainedModel, report: Any) -> None:
    """Take out of a report the names that the model's class knows to be missing or superfluous."""
    model._adjust_missing_and_unexpected_keys(report)


def destinations(model: PreTrainedModel, names: Iterable[str], conversions: list[Conversion]) -> dict[str, str]:
    """The parameter that each tensor of a checkpoint becomes, or becomes a part of. Unused tensors are left out."""
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    state, parameter_of = model.state_dict(), {}
    for name in names:
        parameter, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if parameter not in state and name in state:
            parameter = name
        if parameter in state:
            parameter_of[name] = parameter
    return parameter_of


def export_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert parameters, by their names in the model, back to the checkpoint's names and form.

    The model must have been made by `from_pretrained`.
    """
    return revert_weight_conversion(model, tensors)


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """For each parameter that is tied to another one, the name of that one."""
    return model.all_tied_weights_keys


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function: "eager" holds all scores in memory, others do not."""
    return model.config._attn_implementation


@contextmanager
def attention_by_calls() -> Iterator[None]:
    """Inside the `with` block, `nn.MultiheadAttention` multiplies with one matrix at a time.

    By itself it calls one fused function, or one function of Python whose inside a torch function mode does not see.
    """
    fast, whole = torch.backends.mha.get_fastpath_enabled(), functional.multi_head_attention_forward
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        functional.multi_head_attention_forward = _not_dispatched(whole)
        yield
    finally:
        functional.multi_head_attention_forward = whole
        torch.backends.mha.set_fastpath_enabled(fast)


def _not_dispatched(function: Any) -> Any:
    """The same function of Python, which is not handed to a torch function mode as a whole."""
    names = function.__globals__ | {"has_torch_function": lambda operands: False}
    same = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


# Entries of a config, and their values where a forward returns no more than a run needs.
_OUTPUTS = {"output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
_OUTPUTS |= {"return_dict": True}

# The same for a model in memory: it keeps no keys and values, and its mixtures multiply with one expert at a time,
# where the input of each is seen.
_IN_MEMORY = _OUTPUTS | {"use_cache": False, "_experts_implementation_internal": "eager"}

# An entry of a config: the config, its name, its value.
Entry = tuple[Any, str, Any]


def ask_for_no_more(config: Any) -> None:
    """Change a config, and those in it, so that a forward returns what a run needs."""
    _set(_entries(config, _OUTPUTS))
    for name in getattr(config, "sub_configs", ()):
        ask_for_no_more(getattr(config, name, None))


@contextmanager
def asked_for_no_more(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Inside the `with` block, the configs of a model in memory have the entries of a run.

    Yields a function that makes a context in which the configs are as they were, such as the model is written with.
    """
    # Modules may share a config.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    with _changed([entry for config in configs.values() for entry in _entries(config, _IN_MEMORY)]) as as_before:
        yield as_before


@contextmanager
def _changed(entries: list[Entry]) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Inside the `with` block, entries have these values. Yields the function that makes the inverse of it."""
    before = [(config, name, getattr(config, name)) for config, name, _ in entries]
    try:
        _set(entries)
        yield partial(_changed, before)
    finally:
        _set(before)


def _entries(config: Any, values: dict[str, Any]) -> list[Entry]:
    """Those of these entries that a config has, with these values."""
    return [(config, name, value) for name, value in values.items() if getattr(config, name, None) is not None]


def _set(entries: Iterable[Entry]) -> None:
    for config, name, value in entries:
        setattr(config, name, value)
