"""Models in memory, whose layers are changed in place: on text, or on batches of the arguments of their forward."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsefw import checkpoint, data
from sparsefw.driver.in_memory import run_in_memory
from sparsefw.driver.job import Job
from sparsefw.errors import InputError
from sparsefw.inputs import Inputs, Output
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report import Report
from sparsefw.solver.config import PruneConfig


def prune_on_text(
    model: Any,
    inputs: Inputs,
    dataset: Sequence[str] | Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    output: Path | None,
    places: dict[str, Any],
    log: Callable[[str], None],
    progress: bool,
    ranks: Ranks = ALONE,
) -> Report:
    """Prune a model of transformers in memory on text.

    Args:
        model: the model.
        inputs: names of the texts.
        dataset: calibration data without a name, see `Job`.
        tokenizer: the model's tokenizer; None: the one beside the checkpoint that it was loaded from.
        config, output, places, log, progress, ranks: as for `prune_on_batches`.

    Raises:
        InputError: it is no model of transformers, it has adapters, a weight has no data, entries of a weight share
            memory, no tokenizer is known, or as `run_in_memory`.
    """
    if isinstance(model, nn.Module):
        _check(model)
    if not isinstance(model, PreTrainedModel):
        other = "; any other module needs batches: calibration=" if isinstance(model, nn.Module) else ""
        raise InputError(
            f"model: expected a folder, a Hub id or a transformers model, got {type(model).__name__}{other}"
        )
    if tokenizer is None and not (isinstance(dataset, Tensor) and not inputs.evaluate):
        tokenizer = _tokenizer_of(model)
    with _folder(output, ranks) as folder:
        job = Job(inputs, config, Output(folder, **places), dataset, tokenizer)
        return _without(output, run_in_memory(model, job, None, output is not None, log, progress, ranks))


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
    _check(model)
    batches = data.batches_of(calibration, "calibration")
    evaluated = None if evaluation is None else data.batches_of(evaluation, "evaluate")
    texts = (data.BATCHES,) if evaluated else ()
    inputs = Inputs(model=type(model).__name__, dataset=(data.BATCHES,), nsamples=batches.n, evaluate=texts)
    with _folder(output, ranks) as folder:
        job = Job(inputs, config, Output(folder, **places))
        given = batches, evaluated
        return _without(output, run_in_memory(model, job, given, output is not None, log, progress, ranks))


def _check(model: nn.Module) -> None:
    """Refuse a model with a weight that cannot be written to where it is.

    The library of adapters writes these alone, and merged later they fill the zeros. Weights that a library has
    offloaded are elsewhere. One of which several entries are the same place cannot be pruned one by one.
    """
    # Earlier versions of peft leave the config on a model whose adapters were merged, and none of their modules.
    of_peft = any(kind.__module__.split(".")[0] == "peft" for m in model.modules() for kind in type(m).__mro__)
    for name, module in model.named_modules():
        config = getattr(module, "peft_config", None)
        if getattr(module, "_hf_peft_config_loaded", False) or (config and of_peft):
            raise InputError(f"{name or 'model'}: has adapters of peft; merge the adapters first: merge_and_unload()")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"{name}: is on the meta device, without data; give a model with its weights, or a language model as "
                "the folder or Hub id of its checkpoint, which is read block by block"
            )
        if not _are_disjoint(parameter):
            raise InputError(f"{name}: its entries share memory, and cannot be pruned one by one; give .clone()")


def _are_disjoint(tensor: Tensor) -> bool:
    """Whether each entry of a tensor has its own memory: every step leads beyond all that smaller steps reach."""
    end = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= end:
                return False
            end += step * (size - 1)
    return True


@contextmanager
def _folder(output: Path | None, ranks: Ranks) -> Iterator[Path]:
    """The folder that a run writes to: the output, or a temporary one, the same for all ranks."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="sparsefw-") as scratch:
        try:
            yield ranks.broadcast_object(Path(scratch) / "pruned")
        except BaseException as error:
            # They promise that the run can go on. The folder is gone with what was finished.
            getattr(error, "__notes__", []).clear()
            raise


def _without(output: Path | None, report: Report) -> Report:
    """A report that names no temporary folder."""
    return report if output else replace(report, arguments=report.arguments | {"output": None})


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
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
