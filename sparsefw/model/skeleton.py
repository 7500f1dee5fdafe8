"""A checkpoint's model without its weights, and how tensors of the checkpoint get into it.

The skeleton is the model's own class, whole, and costs no memory: parameters are on the meta device, and only buffers
that are computed, not stored (rotary tables, masks), are real. Tensors are loaded when they are needed, a block at a
time, and renamed or stacked on the way as transformers does it for the whole model. So the experts of only one block
are stacked at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from sparsefw.checkpoint import trust
from sparsefw.checkpoint.quantization import KEY, ORIGINAL
from sparsefw.checkpoint.source import CONFIG, Checkpoint
from sparsefw.checkpoint.tensors import Loadable
from sparsefw.errors import InputError, first_line, shown
from sparsefw.model import hf as private
from sparsefw.model.hf import ask_for_no_more
from sparsefw.model.slots import Slot, restore, slots_of

# Errors of transformers for a config or tensors that do not fit. They cannot be fewer: entries of a config reach the
# code of a model's class unchecked, and a wrong one fails wherever it is used first, as a size, a key, an attribute or
# a divisor. Only MemoryError and mistakes in the source of transformers, such as NameError, are left out.
LOADING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

# Computed buffers of real models take a few MiB; a config that asks for more than its checkpoint's size is no model's.
BUFFERS_ALLOWED = 64 * 2**20


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: the model; its computed buffers are real, on the host.
        goes_into: the parameter that a tensor becomes, or becomes a part of, by the tensor's name in the checkpoint.
        conversions: how transformers renames and stacks tensors.
        dtype: dtype of the model.
        unused: names of tensors that the model has no use for.
        replaced: the class that the config names, where another one was built; else "".
    """

    model: PreTrainedModel
    goes_into: dict[str, str]
    conversions: list[private.Conversion]
    dtype: torch.dtype
    unused: list[str]
    replaced: str = ""

    def load(self, tensors: Mapping[str, Loadable], device: torch.device) -> dict[str, Tensor]:
        """Parameters made of tensors of the checkpoint, by their names. They may share the tensors' memory.

        Quantized tensors are dequantized on the device.

        Args:
            tensors: tensors by their names in the checkpoint: all those of the parameters that they go into.
            device: device for the parameters.
        """
        slots = slots_of(self.model.named_modules(remove_duplicate=False))

        def loaded() -> list[Slot]:
            # A tensor may go into several parameters, as one of queries, keys and values does.
            return [slot for slot in slots if slot.tensors[slot.name] is not slot.own]

        try:
            report = private.load_tensors(self.model, tensors, self.dtype, device, self.conversions)
            # Shapes were compared when the skeleton was built.
            assert not report.mismatched_keys, report
            assert not report.conversion_errors, report
            return {slot.path: slot.tensors[slot.name] for slot in loaded()}
        finally:
            restore(loaded())

    def names_of(self, tensors: Iterable[str]) -> dict[str, list[str]]:
        """Names of tensors by the parameter that they go into; those that go into none are left out."""
        names: dict[str, list[str]] = {}
        for name, parameter in private.destinations(self.model, tensors, self.conversions).items():
            names.setdefault(parameter, []).append(name)
        return names

    def exported(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by their names in the model, under the checkpoint's names and in its form; on the host."""
        return {k: v.cpu().contiguous() for k, v in private.export_tensors(self.model, tensors).items()}


def build(checkpoint: Checkpoint, as_named: bool = False) -> Skeleton:
    """Build a checkpoint's model from its config, and compare it with the checkpoint's headers; reads no tensor.

    Args:
        checkpoint: the checkpoint.
        as_named: whether to take the class that the config names, though it may generate no text.

    Raises:
        InputError: transformers cannot load it, or tensors are missing or do not fit.
    """
    # transformers would draw a progress bar for every block.
    logging.disable_progress_bar()
    # The model is built twice.
    with _loading(checkpoint, "model", 2):
        return _build(checkpoint, _config(checkpoint.folder), as_named)


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The config of a checkpoint, with the defaults of its class.

    Raises:
        InputError: transformers cannot load it.
    """
    with _loading(checkpoint, "config", 1):
        return _config(checkpoint.folder)


@contextmanager
def _loading(checkpoint: Checkpoint, what: str, times: int) -> Iterator[None]:
    """Turn errors of transformers, inside the `with` block, into one line.

    Args:
        checkpoint: the checkpoint.
        what: what is loaded, for the message.
        times: how often.
    """
    try:
        trust.check_model_type(checkpoint.config, checkpoint.folder / CONFIG)
        with trust.bounded(times * len(checkpoint.tensors)):
            yield
    except InputError:
        raise
    except LOADING as error:
        raise InputError(f"{checkpoint.folder}: transformers cannot load this {what}: {first_line(error)}") from error


def _config(folder: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    forget_quantization(config)
    ask_for_no_more(config)
    return config


def forget_quantization(config: Any) -> None:
    """Take the quantization out of a config: transformers would ask for the libraries and the GPU that it needs.

    The checkpoint's tensors are dequantized before transformers sees them.
    """
    for part in (config, getattr(config, "text_config", None)):
        if hasattr(part, KEY):
            delattr(part, KEY)


def _build(checkpoint: Checkpoint, config: Any, as_named: bool) -> Skeleton:
    # Some versions of the fused attention silently leave out a cap on attention logits.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    options: dict[str, Any] = {
        "dtype": checkpoint.dtype,
        "attn_implementation": "eager" if capped else None,
        # One product per expert, where its inputs can be seen.
        "experts_implementation": "eager",
    }
    named = config.architectures or []
    named_class = private.named_class(config) if as_named else None
    kind, config = (named_class, config) if named_class else class_of(config, checkpoint.folder)
    with torch.device("meta"):
        empty = private.from_config(kind, config, **options)
    conversions = private.conversions_of(empty)
    # First on the meta device, where nothing is allocated: `from_pretrained` would make up what is missing.
    report = private.load_tensors(empty, _promises(checkpoint), checkpoint.dtype, torch.device("meta"), conversions)
    private.forgive(empty, report)
    _check(report, empty, checkpoint)
    model = private.from_promises(type(empty), config, _promises(checkpoint), **options)
    model.eval().requires_grad_(False)
    goes_into = private.destinations(model, checkpoint.tensors, conversions)
    _check_dtypes(goes_into, model, checkpoint)
    unused = sorted(checkpoint.tensors.keys() - goes_into.keys())
    replaced = "" if kind.__name__ in named or not named else shown(named[0])
    return Skeleton(model, goes_into, conversions, checkpoint.dtype, unused, replaced)


def class_of(config: PretrainedConfig, place: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class of a config's model, and the config that the class takes: the text part of one, for a class of text.

    It is the class that the config names, if transformers lists it for generating text. Otherwise it is what the lists
    say for the config, models of text alone first. No code of a checkpoint is run.

    Args:
        config: the config as transformers has read it.
        place: folder or file of the config, for the message.

    Raises:
        InputError: there is none.
    """
    kind = private.generating_class(config)
    if kind is None:
        named = shown(", ".join(map(str, config.architectures or [])) or config.model_type)
        why = (
            "has a decoder that reads what an encoder puts out"
            if config.is_encoder_decoder
            else f"is none that generates text, and transformers has none for {shown(config.model_type)}"
        )
        raise InputError(
            f"{place}: transformers cannot load this model: unsupported architecture: {named} {why}; give a model that "
            "generates text from text"
        )
    text = config.get_text_config()
    takes_text = kind.config_class is type(text) and kind.config_class is not type(config)
    return kind, text if takes_text else config


def max_seqlen(config: PretrainedConfig) -> int | None:
    """Tokens in the longest window that a model takes; None if its config sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _promises(checkpoint: Checkpoint) -> dict[str, private.PromisedTensor]:
    return {name: private.PromisedTensor(info.shape, info.dtype) for name, info in checkpoint.tensors.items()}


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


def _check(report: private.LoadReport, empty: PreTrainedModel, checkpoint: Checkpoint) -> None:
    if report.conversion_errors:
        name, error = sorted(report.conversion_errors.items())[0]
        raise InputError(f"{name}: cannot be made of the checkpoint's tensors: {first_line(error)}")
    if mismatched := sorted(report.mismatched_keys):
        name, stored, expected = mismatched[0]
        raise InputError(f"{name}: the checkpoint has shape {tuple(stored)}, the config asks for {tuple(expected)}")
    # One tensor is enough for parameters that are tied.
    tied = [pair for pair in private.tied_parameters(empty).items() if not report.missing_keys.issuperset(pair)]
    if missing := sorted(report.missing_keys.difference(*tied)):
        raise InputError(f"{missing[0]}: this tensor is missing from the checkpoint ({len(missing)} in all)")
    size = sum(buffer.nbytes for buffer in empty.buffers())
    if size > BUFFERS_ALLOWED + checkpoint.nbytes:
        raise InputError(f"{checkpoint.folder / CONFIG}: asks for tables of {size / 2**30:.1f} GiB beside the weights")
