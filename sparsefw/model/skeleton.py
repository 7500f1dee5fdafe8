"""A checkpoint's model without its weights (the skeleton), and the loading of tensors into it.

The skeleton is an instance of the model's own class. It takes hardly any memory: its parameters are on the meta device,
and only computed buffers (rotary tables, masks) have data. Tensors are loaded a block at a time. transformers renames
and stacks them in the same way as for a whole model, so the stacked experts of only one block are in memory.

Nearly all private names of transformers that the package `model` uses are in this file; the others are in `settings`
and `streamed`. They were tested with transformers 5.17 to 5.24, and another version may change them.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
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
from transformers.models.auto import AutoConfig, modeling_auto
from transformers.utils import logging

from sparsefw.checkpoint.quantization import GUARD, KEY, ORIGINAL
from sparsefw.checkpoint.source import CONFIG, Checkpoint
from sparsefw.checkpoint.tensors import Loadables, TensorInfo, Tensors
from sparsefw.errors import InputError, errors_in_one_line, first_line, shown
from sparsefw.memory import bounded, to_host
from sparsefw.model.settings import ONE_BY_ONE, ask_for_no_more
from sparsefw.model.swap import restore, slots_of

# Bytes that computed buffers may take beyond the checkpoint's size. In real models they take a few MiB; a config that
# asks for more is damaged or malicious.
BUFFERS_ALLOWED = 64 * 2**20

# Bytes that a model without its weights may take, with the modules that are imported for it: ten times a large one's.
MOST_BYTES = 2 * 2**30

# Types of models whose positions begin after the number of the padding token.
AFTER_PADDING = (
    "roberta",
    "roberta-prelayernorm",
    "camembert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "data2vec-text",
    "mpnet",
)

# transformers' lists of classes that generate text; each maps a type of config to classes. If a config names no class,
# the first list with an entry for it counts.
_GENERATING = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: the model; only its computed buffers have data, on the host.
        goes_into: maps a tensor's name in the checkpoint to the parameter that the tensor is loaded into, as a whole or
            as a part of the parameter.
        conversions: how transformers renames and stacks tensors.
        checkpoint: the checkpoint.
        unused: names of the checkpoint's tensors that the model does not use.
        replaced: the class that the config names, if another class was built; else "".
    """

    model: PreTrainedModel
    goes_into: dict[str, str]
    conversions: list[WeightTransform]
    checkpoint: Checkpoint
    unused: list[str]
    replaced: str

    def load(self, tensors: Loadables, device: torch.device) -> Tensors:
        """Make parameters from tensors of the checkpoint; returns them by name. They may share the tensors' memory.

        Quantized tensors are dequantized on the device.

        Args:
            tensors: tensors by name in the checkpoint. A parameter that is joined from several tensors needs them all.
            device: device for the parameters.
        """
        slots = slots_of(self.model.named_modules(remove_duplicate=False))
        try:
            report = _load_tensors(self.model, tensors, self.checkpoint.dtype, device, self.conversions)
            # These errors cannot occur: shapes were compared when the skeleton was built.
            assert not report.mismatched_keys, report
            assert not report.conversion_errors, report
            # The result is read from the slots, since one tensor (fused queries, keys and values) may fill several.
            return {slot.path: x for slot in slots if (x := slot.tensors[slot.name]) is not slot.own}
        finally:
            restore(slots)

    def names_of(self, tensors: Iterable[str]) -> dict[str, list[str]]:
        """Group the names of tensors by the parameter that they are loaded into; unused tensors are left out."""
        names: dict[str, list[str]] = {}
        for name, parameter in _destinations(self.model, tensors, self.conversions).items():
            names.setdefault(parameter, []).append(name)
        return names

    def exported(self, tensors: Tensors) -> Tensors:
        """Convert parameters, by their names in the model, back to tensors of a checkpoint, on the host (`to_host`)."""
        return {k: to_host(v) for k, v in revert_weight_conversion(self.model, tensors).items()}


def build(checkpoint: Checkpoint, as_named: bool = False) -> Skeleton:
    """Build a checkpoint's model from its config, and compare it with the headers of the tensors; reads no tensor.

    Args:
        checkpoint: the checkpoint. If it has no tensors, it is a config only, and is treated as complete.
        as_named: whether to take the class that the config names even if that class does not generate text.

    Raises:
        InputError: transformers cannot load the model, or tensors are missing or have wrong shapes.
    """
    # transformers would draw a progress bar for every block.
    logging.disable_progress_bar()
    config: Any = read_config(checkpoint)
    with _of_library(checkpoint, "model"):
        return _build(checkpoint, config, as_named)


@contextmanager
def _of_library(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Bound the memory of what transformers makes of a config, and turn its errors into one line."""
    large = f"{checkpoint.folder / CONFIG}: its {what}"
    with (
        bounded(large, MOST_BYTES),
        errors_in_one_line(f"{checkpoint.folder}: transformers cannot load this {what}", limit=600),
    ):
        yield


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Read the config of a checkpoint, with the defaults of its class, and without the entry for quantization.

    With this entry transformers would ask for the libraries and the GPU that the quantization needs. A run does not
    need them: tensors are dequantized before transformers gets them.

    Raises:
        InputError: transformers cannot load the config.
    """
    with _of_library(checkpoint, "config"):
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        for part in (config, getattr(config, "text_config", None)):
            for key in (KEY, GUARD):
                if hasattr(part, key):
                    delattr(part, key)
        ask_for_no_more(config)
        return config


def _build(checkpoint: Checkpoint, config: Any, as_named: bool) -> Skeleton:
    # Some versions of the fused attention silently ignore soft-capping of attention logits.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    named = config.architectures or []
    kind, config = class_of(config, checkpoint.folder, as_named)
    # Built on the meta device, where nothing is allocated. `from_pretrained` would initialize missing parameters.
    with torch.device("meta"):
        model = kind._from_config(
            config,
            dtype=checkpoint.dtype,
            attn_implementation="eager" if capped else None,
            # One product per expert, so that each expert's input is a tensor.
            experts_implementation=ONE_BY_ONE,
        )
        if not checkpoint.tensors:
            # A checkpoint stores one of several tied parameters.
            state = {n: x for n, x in model.state_dict().items() if n not in model.all_tied_weights_keys}
            infos = {name: TensorInfo(checkpoint.folder, x.dtype, tuple(x.shape)) for name, x in state.items()}
            checkpoint = replace(checkpoint, tensors=infos)
        promises = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()}
    conversions = get_model_conversion_mapping(model)
    report = _load_tensors(model, promises, checkpoint.dtype, torch.device("meta"), conversions)
    # Drops names from the report that the class declares as legitimately missing or unexpected.
    model._adjust_missing_and_unexpected_keys(report)
    _check(report, model, checkpoint)
    # Ties parameters, and computes buffers.
    model._finalize_model_loading(model, LoadStateDictConfig(device_map={"": torch.device("cpu")}), report)
    model.eval().requires_grad_(False)
    goes_into = _destinations(model, checkpoint.tensors, conversions)
    _check_dtypes(goes_into, model, checkpoint)
    unused = sorted(checkpoint.tensors.keys() - goes_into.keys())
    replaced = "" if kind.__name__ in named or not named else shown(named[0])
    return Skeleton(model, goes_into, conversions, checkpoint, unused, replaced)


def class_of(
    config: PretrainedConfig, place: Path, as_named: bool = False
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Find the class for a config, and the config that this class takes: for a text model, the config's text part.

    It is the class that the config names, if transformers lists this class for generating text. If not, it is the class
    in transformers' lists for this type of config; text-only models come first. No code of a checkpoint is run.

    Args:
        config: the config as transformers has read it.
        place: folder or file of the config, for the message.
        as_named: as for `build`.

    Raises:
        InputError: there is no such class.
    """
    kind = _generating_class(config, as_named)
    if kind is None:
        named = shown(", ".join(map(str, config.architectures or [])) or config.model_type)
        why = "has a decoder that reads an encoder's output" if config.is_encoder_decoder else "generates no text"
        raise InputError(
            f"{place}: transformers cannot load this model: unsupported architecture: {named} {why}; give a model that "
            f"generates text from text, or prune this one {_on_batches(config.architectures, place)}"
        )
    text = config.get_text_config()
    takes_text = kind.config_class is type(text) and kind.config_class is not type(config)
    return kind, text if takes_text else config


def _generating_class(config: PretrainedConfig, as_named: bool) -> type[PreTrainedModel] | None:
    """Find the class of `class_of`; None if there is none.

    A class that the config names counts only if it takes this type of config. In two cases the lists are not searched
    for another class:

    - A model with encoder and decoder has to name a class of the first list, whose decoders run alone. Other decoders
      need the encoder's output, and would be pruned without it.
    - The type of config also has classes that fill in masked tokens, and the config names a class. If the named class
      does not generate text, its tokens see the later tokens, which the model would have to predict.
    """
    lists = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING") for task in _GENERATING]
    lists = lists[:1] if config.is_encoder_decoder else lists
    # An entry of a list is the name of a class, or a tuple of names.
    listed = [entry for classes in lists for entry in classes._model_mapping.values()]
    known = {name for entry in listed for name in ([entry] if isinstance(entry, str) else entry)}
    taken = {type(config), type(config.get_text_config())}
    for name in config.architectures or []:
        kind = getattr(transformers, name, None) if isinstance(name, str) and (as_named or name in known) else None
        if kind is not None and getattr(kind, "config_class", None) in taken:
            return kind
    encodes = bool(config.architectures) and type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    for classes in [] if config.is_encoder_decoder or encodes else lists:
        if found := classes.get(type(config), None):
            return found[0] if isinstance(found, tuple | list) else found
    return None


def _on_batches(names: Any, place: Path) -> str:
    """Tell the user how to prune a model on batches, from Python. `names` are the classes that the config names."""
    name = names[0] if isinstance(names, list) and has_class(names[:1]) else "AutoModel"
    reads = getattr(getattr(transformers, name), "main_input_name", "input_ids")
    return (
        f"on batches, from Python: from transformers import {name}; from sparsefw import prune; "
        f"model = {name}.from_pretrained({str(place)!r}); "
        f"prune(model, 'pruned/', calibration=[{{'{reads}': ...}}, ...]), see docs/batches.md"
    )


def has_class(names: object) -> bool:
    """Whether transformers has any of the classes that a config names."""
    listed = names if isinstance(names, list) else []
    return any(isinstance(name, str) and isinstance(getattr(transformers, name, None), type) for name in listed)


def max_seqlen(config: PretrainedConfig) -> int | None:
    """Number of tokens in the longest window that a model takes; None if its config sets no limit."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    return limit - (config.pad_token_id or 0) - 1 if config.model_type in AFTER_PADDING else limit


def _load_tensors(
    model: PreTrainedModel,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    conversions: list[WeightTransform],
) -> Any:
    """Convert tensors and put them into a model, as `from_pretrained` does; returns the report of transformers.

    Args:
        model: the model. Parameters without tensors are not changed.
        tensors: tensors of the checkpoint by name, or meta tensors. A parameter that is joined from several tensors
            needs them all.
        dtype: dtype for the parameters.
        device: device for the parameters.
        conversions: how transformers renames and stacks tensors for a model of this class.

    Raises:
        OutOfMemoryError: the memory of the GPU is full.
        MemoryError: the memory of the host is full.
    """
    conversions_of_all = getattr(model, "_weight_conversions", None)
    options = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        # The annotation of `weight_mapping` names two subclasses only, but all are accepted.
        weight_mapping=conversions,  # type: ignore[arg-type]
    )
    # This call touches all parameters of the model. Without this `with`, a tracer would count them as read.
    with torch._C.DisableTorchFunction():
        report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), options)
    # Loading sets this attribute to the conversions of the loaded tensors. `Skeleton.exported` needs all conversions.
    if conversions_of_all is not None:
        model._weight_conversions = conversions_of_all
    # transformers catches exceptions while it joins tensors. Full memory is raised again here.
    for text in report.conversion_errors.values():
        if "OutOfMemoryError" in text:
            raise torch.OutOfMemoryError(next(line for line in text.splitlines() if "OutOfMemoryError" in line))
        if "MemoryError" in text or "DefaultCPUAllocator" in text:
            raise MemoryError
    return report


def _destinations(model: PreTrainedModel, names: Iterable[str], conversions: list[WeightTransform]) -> dict[str, str]:
    """Map each tensor of a checkpoint to the parameter that it is loaded into; unused tensors are left out."""
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


def with_masks(conversions: list[WeightTransform], suffix: str) -> list[WeightTransform]:
    """Add to each conversion the same one for tensors whose names end with a suffix, such as masks of weights.

    Before transformers 5.20 the conversion of a weight takes names with suffixes, too.
    """
    found = []
    for one in conversions:
        found.append(one)
        if type(one) in (WeightRenaming, WeightConverter) and hasattr(one, "copy"):
            operations = {"operations": one.operations} if type(one) is WeightConverter else {}
            patterns = one._original_source_patterns, one._original_target_patterns
            found.append(one.copy(*([pattern + suffix for pattern in of] for of in patterns), **operations))
    return found


def reads_weight(model: PreTrainedModel, parameter: str) -> bool:
    """Tell whether the code around a layer reads its weight itself, as Mamba's does, by the source of the class."""
    above, *layer = f".{parameter}".rsplit(".", 2)
    return f".{'.'.join(layer)}" in inspect.getsource(type(model.get_submodule(above[1:])))


def _check_dtypes(goes_into: dict[str, str], model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse integer tensors for floating-point parameters: they are quantized weights without their scales."""
    state = model.state_dict()
    for name, parameter in goes_into.items():
        tensor = checkpoint.tensors[name]
        if state[parameter].is_floating_point() and not tensor.dtype.is_floating_point:
            raise InputError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, and the model has {state[parameter].dtype} "
                f"there: it is quantized in a way that {CONFIG} does not name; {ORIGINAL}"
            )


def _check(report: Any, empty: PreTrainedModel, checkpoint: Checkpoint) -> None:
    if report.conversion_errors:
        name, error = sorted(report.conversion_errors.items())[0]
        raise InputError(f"{name}: cannot be made from the checkpoint's tensors: {first_line(error)}")
    if mismatched := sorted(report.mismatched_keys):
        name, stored, expected = mismatched[0]
        raise InputError(f"{name}: the checkpoint has shape {tuple(stored)}, the config asks for {tuple(expected)}")
    # One of two tied parameters may be missing.
    tied = [pair for pair in empty.all_tied_weights_keys.items() if not report.missing_keys.issuperset(pair)]
    if missing := sorted(report.missing_keys.difference(*tied)):
        text = f"{missing[0]}: this tensor is missing from the checkpoint ({len(missing)} in all)"
        named: Any = checkpoint.config.get("architectures")
        if has_class(named) and type(empty).__name__ not in named:
            # The class that the config names may not need this tensor, such as an encoder without a head.
            text += f": {named[0]} generates no text; prune it {_on_batches(named, checkpoint.folder)}"
        raise InputError(text)
    size = sum(buffer.nbytes for buffer in empty.buffers())
    if size > BUFFERS_ALLOWED + checkpoint.nbytes:
        raise InputError(f"{checkpoint.folder / CONFIG}: asks for tables of {size / 2**30:.1f} GiB besides the weights")


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function. "eager" holds all attention scores in memory; other functions do not."""
    return model.config._attn_implementation
