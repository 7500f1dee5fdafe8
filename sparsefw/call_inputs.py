"""Convert the arguments of `prune`, texts, tokens and batches, to inputs of a run, and check models in memory."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from sparsefw.data.text import TEXTS, TOKENS
from sparsefw.errors import InputError, option, shown
from sparsefw.inputs import Inputs, name_and_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsefw.data.batches import Batches

# Calibration data, see `prune`.
Dataset = str | Path | Mapping[Any, Any] | Iterable[Any] | Tensor

# The accepted kinds of calibration data, for messages.
EXPECTED = "a name or path, a mapping of these to shares, texts, tokens, or records of text, messages or input_ids"


def text_inputs(
    model: str, dataset: Dataset | None, evaluate: Any, **numbers: int | None
) -> tuple[Inputs, Iterable[Any] | None]:
    """Make the inputs of a run on text; returns also calibration data that has no name.

    Args:
        model: name of the model.
        dataset, evaluate: as for `prune`.
        numbers: nsamples, seqlen, seed and eval_windows; None stands for the default.
    """
    named = numbers | {"evaluate": evaluate}
    inputs = Inputs(model=model, **{name: value for name, value in named.items() if value is not None})
    if dataset is None:
        return inputs, None
    if isinstance(dataset, str | Path):
        return replace(inputs, dataset=(str(dataset),)), None
    if isinstance(dataset, Mapping) and all(isinstance(share, Real) for share in dataset.values()):
        return replace(inputs, dataset=tuple(f"{name}={share}" for name, share in dataset.items())), None
    if not isinstance(dataset, Tensor):
        dataset = _texts_or_tokens(dataset, inputs, numbers["seqlen"])
    if not isinstance(dataset, Tensor):
        return replace(inputs, dataset=(TEXTS,)), dataset
    if dataset.ndim != 2:
        raise InputError(f"dataset: expected tokens (windows, seqlen), got shape {tuple(dataset.shape)}")
    shape: dict[str, Any] = dict(zip(("nsamples", "seqlen"), dataset.shape, strict=True))
    for name, value in shape.items():
        if numbers[name] not in (None, value):
            raise InputError(f"{option(name, numbers[name])}: the token ids have {name} {value}; leave it out")
    return replace(inputs, dataset=(TOKENS,), **shape), dataset


def _texts_or_tokens(dataset: Any, inputs: Inputs, seqlen: int | None) -> Iterable[Any]:
    """Make windows of records with tokens. Texts and records with text are returned unchanged.

    Raises:
        InputError: the data is of another kind, there is no record, a record is a name, or the tokens do not fill a
            window.
    """
    from sparsefw.data.records import TEXT_COLUMNS
    from sparsefw.data.text import NAMES
    from sparsefw.data.windows import windows_of_records

    kind = type(dataset).__name__
    # Iteration over a data frame yields the names of its columns.
    if not isinstance(dataset, Iterable) or kind in ("DataFrame", "bytes"):
        raise InputError(f"dataset: got {kind}, expected {EXPECTED}")
    if isinstance(dataset, DataLoader) and dataset.collate_fn is default_collate:
        dataset = _Uncollated(dataset)
    # Tokenizers and slices of datasets return a mapping of columns, which holds several records.
    data = [dataset] if isinstance(dataset, Mapping) else dataset
    records = iter(data)
    item = inner = next(records, None)
    if item is None:
        raise InputError(f"dataset: the {kind} has no record; give texts or tokens")
    records, columns = chain([item], records), [*item] if isinstance(item, Mapping) else []
    while isinstance(inner, list | tuple) and inner:
        inner = inner[0]
    texts = isinstance(inner, str) or bool({*TEXT_COLUMNS} & {*columns})
    rows = hasattr(item, "ndim") or (inner is not item and isinstance(inner, Integral))
    if "input_ids" in columns or (rows and not texts):
        return windows_of_records(records, TOKENS, nsamples=inputs.nsamples, seqlen=seqlen, seed=inputs.seed)
    named = name_and_share(item)[0] if isinstance(item, str) else ""
    if named in NAMES or os.path.isfile(named):
        raise InputError(f"dataset: {shown(named)} is a text's name; give it alone, or a mapping of names to shares")
    if texts:
        return _Records(records, data)
    of = kind if item is dataset else f"{kind} of {type(item).__name__}"
    of += f" with {shown(', '.join(map(str, columns)))}" if columns else ""
    raise InputError(f"dataset: got {of}, expected {EXPECTED}")


class _Uncollated:
    """The records of a loader, one by one: torch's batches transpose lists of tokens, and take messages apart."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = copy.copy(loader)
        # Workers that persist are those of the caller's function.
        self._loader.collate_fn, self._loader._iterator = list, None

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._loader)


class _Records:
    """Data whose first record was looked at: `records` has all of them, but once; later ones are read from `data`."""

    def __init__(self, records: Iterator[Any], data: Iterable[Any]) -> None:
        self._first, self._data = [records], data

    def __iter__(self) -> Iterator[Any]:
        return self._first.pop() if self._first else iter(self._data)


def batch_inputs(
    model: str, calibration: Iterable[Any], evaluate: Any
) -> "tuple[Inputs, tuple[Batches, Batches | None]]":
    """Make the inputs of a run on batches; returns also the batches for calibration and for evaluation."""
    from sparsefw.data.batches import BATCHES, batches_of

    batches = batches_of(calibration, "calibration")
    evaluated = None if evaluate is None else batches_of(evaluate, "evaluate")
    texts = (BATCHES,) if evaluated else ()
    return Inputs(model=model, dataset=(BATCHES,), nsamples=batches.n, evaluate=texts), (batches, evaluated)


def check_model(model: Any, on_batches: bool) -> None:
    """Refuse an object that is not a model in memory, and a model whose weights cannot be pruned in place.

    A model with adapters of peft is refused, because saving writes the adapters alone, and merging them later fills
    the zeros. Weights on the meta device are missing, or a library has offloaded them.

    Raises:
        InputError: the model is refused; the message names the module or the weight.
    """
    from transformers import PreTrainedModel

    from sparsefw.checkpoint.packed import MASK

    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__module__.split(".")[0] == "peft":
            raise InputError(f"{name or 'model'}: is an adapter of peft; merge the adapters first: merge_and_unload()")
        if f"weight{MASK}" in module._parameters:
            raise InputError(f"{name}: is packed; model.dequantize() makes it dense")
    if not isinstance(model, nn.Module if on_batches else PreTrainedModel):
        expected = "a folder, a Hub id or a transformers model; any other module needs batches: calibration="
        loads = f": AutoModel.from_pretrained({str(model)!r})" if isinstance(model, str | Path) else ""
        expected = f"a module in memory, since calibration= is given{loads}" if on_batches else expected
        raise InputError(f"model: got {type(model).__name__}, expected {expected}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices - {torch.device("meta")}) > 1:
        raise InputError(
            f"model: its weights are on {', '.join(sorted(map(str, devices)))}; load it on one device, or give the "
            "folder or Hub id of a language model's checkpoint, which is read block by block"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"{name}: is on the meta device, without data; give a model with all weights in memory, or the folder "
                "or Hub id of a language model's checkpoint, which is read block by block"
            )
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.dtype == torch.float64:
            raise InputError(f"{name}: has dtype float64; give a model in fp32, fp16 or bf16: model.float()")


def tokenizer_of(model: Any) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the checkpoint that a model of transformers was loaded from.

    Raises:
        InputError: the model was not loaded from a checkpoint, or the checkpoint has no tokenizer.
    """
    from sparsefw.checkpoint.source import SMALL_FILES, locate
    from sparsefw.data.tokens import load_tokenizer

    try:
        if model.name_or_path:
            return load_tokenizer(locate(model.name_or_path, SMALL_FILES))
    except InputError as error:
        raise InputError(f"tokenizer: the model in memory has none ({error}); give tokenizer=") from error
    raise InputError("tokenizer: the model in memory was not loaded from a checkpoint that has one; give tokenizer=")
