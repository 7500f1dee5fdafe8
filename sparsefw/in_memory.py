"""Models in memory, whose layers are changed in place.

Models that generate text are pruned through a checkpoint in a temporary folder. Other models are run as they are, on
batches of the arguments of their forward.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsefw import checkpoint, data
from sparsefw.driver import Job, Output, explained_saving, run_in_memory
from sparsefw.errors import InputError
from sparsefw.inputs import Inputs
from sparsefw.model import StreamedModel
from sparsefw.model.slots import overwrite
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report import Report
from sparsefw.solver import PruneConfig
from sparsefw.solver.selection import without_index


def prune_in_place(
    model: Any,
    run: Callable[[Path, Path, PreTrainedTokenizerBase | None], Report],
    method: str,
    output: Path | None,
    overwrite: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    tokenized: bool,
    ranks: Ranks = ALONE,
) -> Report:
    """Prune a model in memory.

    Args:
        model: the model; its layers are changed in place.
        run: prunes the checkpoint in a folder into another folder, with a tokenizer.
        method: the method whose weights are written.
        output: folder for the pruned checkpoint; None for none.
        overwrite: whether an older checkpoint there may be replaced.
        tokenizer: the model's tokenizer; None: the one beside the checkpoint that it was loaded from.
        tokenized: whether no text has to be tokenized.
        ranks: the processes that share the work; all of them have the model.

    Raises:
        InputError: it is no model of transformers, it has adapters, a weight has no data, entries of a weight share
            memory, no tokenizer is known, or as `run`.
    """
    if isinstance(model, nn.Module):
        _check_adapters(model)
        _check_places(model)
    with _scratch_folder(output) as scratch:
        folder, pruned = scratch / "model", output or ranks.broadcast_object(scratch / "pruned")
        # Before the model is written, which takes a while.
        checkpoint.check_output(pruned, folder, overwrite)
        save(model, folder)
        if tokenizer is None and not tokenized:
            tokenizer = tokenizer_of(model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        report = run(folder, pruned, tokenizer)
        load_layers(model, pruned, [layer.name for layer in report.layers_of(method)])
        ranks.barrier()
    return report if output else replace(report, arguments=report.arguments | {"output": None})


def prune_on_batches(
    model: Any,
    calibration: Iterable[Any],
    evaluation: Any,
    config: PruneConfig,
    output: Path | None,
    places: dict[str, Any],
    log: Callable[[str], None],
    progress: bool,
    ranks: Ranks = ALONE,
) -> Report:
    """Prune a model in memory on batches.

    Args:
        model: any module.
        calibration, evaluation: for each batch the arguments of its forward, see `data.batches_of`; evaluation None:
            none.
        config: how it is pruned.
        output: folder for the pruned model; None for none.
        places: the other fields of `Output`.
        log, progress, ranks: as for `run_in_memory`.

    Raises:
        InputError: the model is no module, it has adapters, a weight has no data, entries of a weight share memory, or
            as `data.batches_of` and `run_in_memory`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"calibration: batches are for a model in memory, and model is a {type(model).__name__}; load it first"
        )
    _check_adapters(model)
    _check_places(model)
    batches = data.batches_of(calibration, "calibration")
    evaluated = None if evaluation is None else data.batches_of(evaluation, "evaluate")
    texts = (data.BATCHES,) if evaluated else ()
    inputs = Inputs(model=type(model).__name__, dataset=(data.BATCHES,), nsamples=batches.n, evaluate=texts)
    with _scratch_folder(output) as scratch:
        job = Job(inputs, config, Output(output or ranks.broadcast_object(scratch / "pruned"), **places))
        report = run_in_memory(model, job, batches, evaluated, output is not None, log, progress, ranks)
    return report if output else replace(report, arguments=report.arguments | {"output": None})


def _check_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters of peft: its library writes these alone, and merged later they fill the zeros."""
    # Earlier versions of peft leave the config on a model whose adapters were merged, and none of their modules.
    of_peft = any(
        kind.__module__.split(".")[0] == "peft" for module in model.modules() for kind in type(module).__mro__
    )
    for name, module in model.named_modules():
        config = getattr(module, "peft_config", None)
        if getattr(module, "_hf_peft_config_loaded", False) or (config and of_peft):
            raise InputError(f"{name or 'model'}: has adapters of peft; merge the adapters first: merge_and_unload()")


def _check_places(model: nn.Module) -> None:
    """Refuse a model with a weight that cannot be written to in its place.

    Weights that a library has offloaded are elsewhere, and one of which several entries are the same place cannot be
    pruned one by one.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"{name}: is on the meta device, without data; give a model with its weights, or a language model as "
                "the folder or Hub id of its checkpoint, which is read block by block"
            )
        if not _apart(parameter):
            raise InputError(f"{name}: its entries share memory, and cannot be pruned one by one; give .clone()")


def _apart(tensor: Tensor) -> bool:
    """Whether each entry of a tensor has a place of its own: every step leads beyond all that smaller steps reach."""
    end = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= end:
                return False
            end += step * (size - 1)
    return True


@contextmanager
def _scratch_folder(output: Path | None) -> Iterator[Path]:
    """A temporary folder for a run into `output`, or into this folder if that is None."""
    with tempfile.TemporaryDirectory(prefix="sparsefw-") as scratch:
        try:
            yield Path(scratch)
        except BaseException as error:
            if output is None:
                # They promise that the run can go on. The folder is gone with what was finished.
                getattr(error, "__notes__", []).clear()
            raise


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as a checkpoint.

    Raises:
        InputError: it is no model of transformers, transformers cannot write it, or it has a dtype that is not read.
    """
    if not isinstance(model, PreTrainedModel):
        other = "; any other module needs batches: calibration=" if isinstance(model, nn.Module) else ""
        raise InputError(
            f"model: expected a folder, a Hub id or a transformers model, got {type(model).__name__}{other}"
        )
    _check_dtypes(model)
    with explained_saving(model):
        model.save_pretrained(folder)


def _check_dtypes(model: PreTrainedModel) -> None:
    """Refuse what would be refused in the checkpoint, whose temporary file means nothing to the caller."""
    if getattr(model.config, "quantization_config", None):
        # The config says which other dtypes are read.
        return
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.dtype not in checkpoint.DTYPES.values():
            raise InputError(
                f"model: {type(model).__name__} has {name} in {value.dtype}; give it in fp32, fp16 or bf16: .to(dtype)"
            )


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


def load_layers(model: PreTrainedModel, folder: Path, layers: Iterable[str]) -> None:
    """Copy layers of a pruned checkpoint into a model, a block at a time; all its other parameters stay as they are.

    Args:
        model: the model that `save` wrote.
        folder: of the pruned checkpoint.
        layers: names of the layers that were pruned, in the model of the checkpoint.

    Raises:
        InputError: the model has no such parameter.
    """
    wanted, own = set(map(without_index, layers)), dict(model.named_parameters())
    with StreamedModel(checkpoint.inspect(folder), torch.device("cpu")) as pruned:
        for i, block in enumerate(pruned.names):
            found = {f"{block}.{name}": parameter for name, parameter in pruned.open(i).named_parameters()}
            for name in wanted.intersection(found):
                # A model without its head has no prefix either.
                parameter = own.get(name, own.get(name.removeprefix(f"{pruned.model.base_model_prefix}.")))
                if parameter is None or parameter.shape != found[name].shape:
                    raise InputError(f"model: it has no parameter {name} as its checkpoint; load the pruned checkpoint")
                overwrite(parameter, found[name])
            pruned.close(i)
