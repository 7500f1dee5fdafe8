"""A checkpoint's model without its weights, the loading of tensors into it, and all else private to transformers.

The skeleton is the model's own class, whole, and costs no memory: parameters are on the meta device, and only buffers
that are computed, not stored (rotary tables, masks), are real. Tensors are loaded when they are needed, a block at a
time, and renamed or stacked on the way as transformers does it for the whole model. So the experts of only one block
are stacked at a time.

Nearly every private or undocumented name of transformers that the models need stands here; the others in `settings`
and `streamed`. transformers may change these in any version. They were tested with 5.17 to 5.24; when a later version
breaks one, this file is the place to mend it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
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
from sparsefw.checkpoint.tensors import Loadable, TensorInfo
from sparsefw.errors import InputError, errors_in_one_line, first_line, shown
from sparsefw.memory import to_host
from sparsefw.model.settings import ONE_BY_ONE, ask_for_no_more
from sparsefw.model.swap import restore, slots_of

# Computed buffers of real models take a few MiB; a config that asks for more than its checkpoint's size is no model's.
BUFFERS_ALLOWED = 64 * 2**20

# The lists of classes that generate text, by type of config. Where no class is named, the first that has one counts.
_GENERATING = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: the model; its computed buffers are real, on the host.
        goes_into: the parameter that a tensor becomes, or becomes a part of, by the tensor's name in the checkpoint.
        conversions: how transformers renames and stacks tensors.
        checkpoint: the checkpoint.
        unused: names of tensors that the model has no use for.
        replaced: the class that the config names, where another one was built; else "".
    """

    model: PreTrainedModel
    goes_into: dict[str, str]
    conversions: list[WeightTransform]
    checkpoint: Checkpoint
    unused: list[str]
    replaced: str = ""

    def load(self, tensors: Mapping[str, Loadable], device: torch.device) -> dict[str, Tensor]:
        """Make parameters of tensors of the checkpoint, by their names. They may share the tensors' memory.

        Quantized tensors are dequantized on the device.

        Args:
            tensors: tensors by their names in the checkpoint: all those of the parameters that they go into.
            device: device for the parameters.
        """
        slots = slots_of(self.model.named_modules(remove_duplicate=False))
        try:
            report = _load_tensors(self.model, tensors, self.checkpoint.dtype, device, self.conversions)
            # Shapes were compared when the skeleton was built.
            assert not report.mismatched_keys, report
            assert not report.conversion_errors, report
            # A tensor may go into several parameters, as one of queries, keys and values does.
            return {slot.path: x for slot in slots if (x := slot.tensors[slot.name]) is not slot.own}
        finally:
            restore(slots)

    def names_of(self, tensors: Iterable[str]) -> dict[str, list[str]]:
        """List the names of tensors by the parameter that they go into, without those that go into no parameter."""
        names: dict[str, list[str]] = {}
        for name, parameter in _destinations(self.model, tensors, self.conversions).items():
            names.setdefault(parameter, []).append(name)
        return names

    def exported(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn parameters, by their names in the model, into the checkpoint's tensors, on the host, see `to_host`."""
        return {k: to_host(v) for k, v in revert_weight_conversion(self.model, tensors).items()}


def build(checkpoint: Checkpoint, as_named: bool = False) -> Skeleton:
    """Build a checkpoint's model from its config, and compare it with the checkpoint's headers; reads no tensor.

    Args:
        checkpoint: the checkpoint. Without tensors it is a config alone: all tensors of its class count as there.
        as_named: whether to take the class that the config names, though it may generate no text.

    Raises:
        InputError: transformers cannot load it, or tensors are missing or do not fit.
    """
    # transformers would draw a progress bar for every block.
    logging.disable_progress_bar()
    config: Any = read_config(checkpoint)
    with errors_in_one_line(f"{checkpoint.folder}: transformers cannot load this model", limit=600):
        return _build(checkpoint, config, as_named)


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Read the config of a checkpoint, with the defaults of its class, and without quantization.

    For a quantized model transformers would ask for the libraries and the GPU that it needs. The checkpoint's tensors
    are dequantized before transformers sees them.

    Raises:
        InputError: transformers cannot load it.
    """
    with errors_in_one_line(f"{checkpoint.folder}: transformers cannot load this config", limit=600):
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        for part in (config, getattr(config, "text_config", None)):
            for key in (KEY, GUARD):
                if hasattr(part, key):
                    delattr(part, key)
        ask_for_no_more(config)
        return config


def _build(checkpoint: Checkpoint, config: Any, as_named: bool) -> Skeleton:
    # Some versions of the fused attention silently leave out a cap on attention logits.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    options: dict[str, Any] = {
        "dtype": checkpoint.dtype,
        "attn_implementation": "eager" if capped else None,
        # One product per expert, where its inputs can be seen.
        "experts_implementation": ONE_BY_ONE,
    }
    named = config.architectures or []
    kind, config = class_of(config, checkpoint.folder, as_named)
    # On the meta device, where nothing is allocated: `from_pretrained` would make up what is missing.
    with torch.device("meta"):
        model = kind._from_config(config, **options)
        if not checkpoint.tensors:
            # Each tied tensor once.
            state = {n: x for n, x in model.state_dict().items() if n not in model.all_tied_weights_keys}
            infos = {name: TensorInfo(checkpoint.folder, x.dtype, tuple(x.shape)) for name, x in state.items()}
            checkpoint = replace(checkpoint, tensors=infos)
        promises = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()}
    conversions = get_model_conversion_mapping(model)
    report = _load_tensors(model, promises, checkpoint.dtype, torch.device("meta"), conversions)
    # Names that the class knows to be missing or superfluous.
    model._adjust_missing_and_unexpected_keys(report)
    _check(report, model, checkpoint)
    # Tied parameters become one, and buffers are computed.
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
    """Find the class of a config's model, and the config that the class takes: for a class of text, the text part.

    It is the class that the config names, if transformers lists it for generating text. Otherwise it is the class that
    the lists have for the config, models of text alone first. No code of a checkpoint is run.

    Args:
        config: the config as transformers has read it.
        place: folder or file of the config, for the message.
        as_named: as for `build`.

    Raises:
        InputError: there is none.
    """
    kind = _generating_class(config, as_named)
    if kind is None:
        named = shown(", ".join(map(str, config.architectures or [])) or config.model_type)
        why = "has a decoder that reads what an encoder puts out" if config.is_encoder_decoder else "generates no text"
        raise InputError(
            f"{place}: transformers cannot load this model: unsupported architecture: {named} {why}; give a model that "
            f"generates text from text, or prune this one {_on_batches(config.architectures, place)}"
        )
    text = config.get_text_config()
    takes_text = kind.config_class is type(text) and kind.config_class is not type(config)
    return kind, text if takes_text else config


def _generating_class(config: PretrainedConfig, as_named: bool) -> type[PreTrainedModel] | None:
    """Find the class that the config names, if transformers lists it for generating text, and it takes this config.

    Otherwise it is the class that the lists have for this type of config; None if there is no such class. The config of
    an encoder and a decoder has to name its class, and the class has to be in the first list, where decoders run alone.
    Another decoder would be pruned without the encoder's output, which it reads. An encoder that fills in masked tokens
    has to name a class that generates text, too: with another class it sees the tokens that it would predict.
    """
    lists = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING") for task in _GENERATING]
    lists = lists[:1] if config.is_encoder_decoder else lists
    # A list has a name, or several, for every type of model.
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
    """Say how a model of a class that a config names is pruned from Python."""
    name = names[0] if isinstance(names, list) and has_class(names[:1]) else "AutoModel"
    reads = getattr(getattr(transformers, name), "main_input_name", "input_ids")
    return (
        f"on batches, from Python: from transformers import {name}; from sparsefw import prune; "
        f"model = {name}.from_pretrained({str(place)!r}); "
        f"prune(model, 'pruned/', calibration=[{{'{reads}': ...}}, ...]), see docs/batches.md"
    )


def has_class(names: object) -> bool:
    """Whether transformers has a class of one of the names that a config lists."""
    listed = names if isinstance(names, list) else []
    return any(isinstance(name, str) and isinstance(getattr(transformers, name, None), type) for name in listed)


def max_seqlen(config: PretrainedConfig) -> int | None:
    """Number of tokens in the longest window that a model takes; None if its config sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _load_tensors(
    model: PreTrainedModel,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    conversions: list[WeightTransform],
) -> Any:
    """Convert tensors and put them into a model, as `from_pretrained` does; returns the report of transformers.

    Args:
        model: the model, whose other parameters stay as they are.
        tensors: tensors of the checkpoint by name, all those of the parameters that they go into; or meta tensors.
        dtype: dtype for the parameters.
        device: device for the parameters.
        conversions: how tensors of a checkpoint are renamed and stacked for a model of its class.

    Raises:
        OutOfMemoryError: the memory of the GPU is full.
        MemoryError: the memory of the host is full.
    """
    conversions_of_all = getattr(model, "_weight_conversions", None)
    options = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        # Its annotation names two of the subclasses, and it takes all.
        weight_mapping=conversions,  # type: ignore[arg-type]
    )
    # It lists all parameters of the model, which must not count as reading them.
    with torch._C.DisableTorchFunction():
        report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), options)
    # Loading replaces these conversions by those of the loaded tensors. `Skeleton.exported` needs those of all tensors.
    if conversions_of_all is not None:
        model._weight_conversions = conversions_of_all
    # transformers catches exceptions while it joins tensors.
    for text in report.conversion_errors.values():
        if "OutOfMemoryError" in text:
            raise torch.OutOfMemoryError(next(line for line in text.splitlines() if "OutOfMemoryError" in line))
        if "MemoryError" in text or "DefaultCPUAllocator" in text:
            raise MemoryError
    return report


def _destinations(model: PreTrainedModel, names: Iterable[str], conversions: list[WeightTransform]) -> dict[str, str]:
    """Find the parameter that each tensor of a checkpoint becomes, or becomes a part of, without unused tensors."""
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


def _check_dtypes(goes_into: dict[str, str], model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse integers where the model has floating-point numbers: they are weights of a quantization without scales."""
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
        raise InputError(f"{name}: cannot be made of the checkpoint's tensors: {first_line(error)}")
    if mismatched := sorted(report.mismatched_keys):
        name, stored, expected = mismatched[0]
        raise InputError(f"{name}: the checkpoint has shape {tuple(stored)}, the config asks for {tuple(expected)}")
    # One tensor is enough for parameters that are tied.
    tied = [pair for pair in empty.all_tied_weights_keys.items() if not report.missing_keys.issuperset(pair)]
    if missing := sorted(report.missing_keys.difference(*tied)):
        text = f"{missing[0]}: this tensor is missing from the checkpoint ({len(missing)} in all)"
        named: Any = checkpoint.config.get("architectures")
        if has_class(named) and type(empty).__name__ not in named:
            # Its own class may need no more, such as an encoder without a head.
            text += f": {named[0]} generates no text; prune it {_on_batches(named, checkpoint.folder)}"
        raise InputError(text)
    size = sum(buffer.nbytes for buffer in empty.buffers())
    if size > BUFFERS_ALLOWED + checkpoint.nbytes:
        raise InputError(f"{checkpoint.folder / CONFIG}: asks for tables of {size / 2**30:.1f} GiB besides the weights")


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function: "eager" holds all scores in memory, others do not."""
    return model.config._attn_implementation
