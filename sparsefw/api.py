"""`prune` prunes a model from Python. The command line calls it.

The driver is imported inside `prune`, after the config is made. Triton decides at its first import whether it
interprets its kernels, and the config settles that.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsefw.caller import on_cpu_by_default, settings_kept
from sparsefw.compiled import unwrapped
from sparsefw.errors import InputError
from sparsefw.flags import checked_path
from sparsefw.inputs import DEFAULT, DEFAULT_MODEL, Inputs, Output, config_for
from sparsefw.ranks import joined_with
from sparsefw.solver.config import PruneConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sparsefw.report import Report
    from sparsefw.solver.layer import LayerResult

# Calibration data, see `prune`.
Dataset = str | Path | Mapping[Any, float] | Sequence[str] | Tensor

# Names of calibration data given as documents, and as token ids.
TEXTS, TOKENS = "texts", "token ids"


@dataclass(frozen=True)
class PruneResult:
    """The result of `prune`.

    Attributes:
        report: the content of report.json.
        output: folder of the pruned checkpoint; None if a model in memory was pruned in place only.
    """

    report: "Report"
    output: Path | None

    @property
    def layers(self) -> "list[LayerResult]":
        """A result for each layer and method: kept weights and errors."""
        return self.report.layers

    @property
    def perplexity(self) -> dict[str, dict[str, float]]:
        """Perplexity by evaluation text, named as in `evaluate`, then by "dense" and by method."""
        names = dict.fromkeys(self.report.argument("evaluate", tuple))
        return {name: text.perplexity for name, text in zip(names, self.report.evaluation, strict=True)}


@settings_kept()
def prune(
    model: "str | Path | nn.Module" = DEFAULT,
    output: str | Path | None = None,
    config: PruneConfig | None = None,
    *,
    dataset: Dataset | None = None,
    calibration: Iterable[Any] | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    evaluate: str | Path | Sequence[str | Path] | Iterable[Any] | None = None,
    eval_windows: int | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    overwrite: bool = False,
    restart: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: bool = False,
    **options: Any,
) -> PruneResult:
    """Prune a model, and write the pruned checkpoint with its report.

    After an interruption the same call goes on after the last finished block. Threads of one process take turns.

    Args:
        model: folder or Hub id of a checkpoint in safetensors; "default", the embedded model; a transformers model in
            memory, or, with `calibration`, any module in memory: these are pruned in place.
        output: folder for the pruned checkpoint; None only for a model in memory.
        config: how to prune; None makes a config of `options`.
        dataset: calibration text: a name or path as for `--dataset`, a mapping of several with the share of the windows
            that each has, a list of documents, or token ids (windows, seqlen). None: c4, or the embedded text for the
            embedded model.
        calibration: in place of a text: for each batch the arguments of the model's forward, as a mapping, a tuple or
            a single tensor. Pixels, masked tokens, features of sound: whatever a stack of blocks is made for.
        nsamples, seqlen: number of calibration windows, and tokens in each. None: the shape of the token ids, else 256
            and 2048 (embedded model: 64 and 128).
        seed: seed of the draw of the calibration windows.
        evaluate: evaluation texts for perplexity, by name or path; with `calibration` batches for which the model
            returns a loss, whose perplexity is exp of the mean loss.
        eval_windows: most windows of each evaluation text; None: all.
        tokenizer: the model's tokenizer; None: the one beside the checkpoint.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a tenth.
        overwrite: whether an older checkpoint in `output` may be replaced.
        restart: whether to discard what an interrupted run has finished.
        log: called with every line of the log.
        progress: whether to show a progress bar.
        options: fields of PruneConfig, in place of `config`.

    Returns:
        The report, and the folder of the pruned checkpoint.

    Raises:
        InputError: an argument is wrong; the message is one line that names it.
        TypeError: an option is unknown, or stands beside a config; or an argument is of another type.
        FloatingPointError: a layer's error is not finite.
    """
    if config is not None and not isinstance(config, PruneConfig):
        raise TypeError(f"config: expected a PruneConfig, got {type(config).__name__}")
    if config is not None and options:
        raise TypeError(f"prune() got a config and {next(iter(options))!r}, which belongs into it")
    folder = None if output is None else checked_path("output", output)
    places: dict[str, Any] = dict(overwrite=overwrite, restart=restart, gpu_memory=gpu_memory, host_memory=host_memory)
    # Batches are not drawn: a seed would have no effect there. 0 is the default.
    drawn = None if seed == 0 else seed
    text = dict(dataset=dataset, nsamples=nsamples, seqlen=seqlen, seed=drawn, eval_windows=eval_windows)
    # Names a model as what torch.compile was given.
    with joined_with(log) as (ranks, say), unwrapped(model) as model:
        run = say, progress and ranks.first, ranks
        if calibration is not None:
            if given := [name for name, value in (text | {"tokenizer": tokenizer}).items() if value is not None]:
                raise TypeError(f"prune() got calibration and {given[0]!r}, which belongs to a text")
            config = _backend_settled(config or PruneConfig(**options))
            from sparsefw.in_memory import prune_on_batches

            report = prune_on_batches(model, calibration, evaluate, config, folder, places, *run)
            return PruneResult(report, folder)
        inputs = _inputs(model, text, evaluate)
        config = _backend_settled(config or config_for(inputs, options))
        documents = None if isinstance(dataset, str | Path | Mapping) else dataset
        if not isinstance(model, str | Path):
            from sparsefw.in_memory import prune_on_text

            with on_cpu_by_default():
                report = prune_on_text(model, inputs, documents, tokenizer, config, folder, places, *run)
        elif folder is None:
            raise InputError("output: where the pruned checkpoint goes is left out")
        else:
            report = prune_checkpoint(inputs, config, Output(folder, **places), documents, tokenizer, say, progress)
        return PruneResult(report, folder)


@settings_kept()
def prune_checkpoint(
    inputs: Inputs,
    config: PruneConfig,
    output: Output,
    dataset: Sequence[str] | Tensor | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    log: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> "Report":
    """Prune a checkpoint, and write the pruned one with its report, whose content is returned.

    Args:
        inputs: names of what is read.
        config: how to prune.
        output: where to write, and the memory to take.
        dataset: calibration data without a name: documents, or token ids (windows, seqlen); None: `inputs` names it.
        tokenizer, log, progress: see `prune`.

    Raises:
        InputError, FloatingPointError: see `prune`.
    """
    config = _backend_settled(config)
    from sparsefw import checkpoint
    from sparsefw.driver.job import Job
    from sparsefw.driver.run import run_job

    with joined_with(log) as (ranks, say), on_cpu_by_default():
        folder = ranks.local_first(lambda: DEFAULT_MODEL if inputs.embedded else checkpoint.locate(inputs.model))
        job = Job(inputs, config, output, dataset, tokenizer, folder)
        return run_job(job, say, progress and ranks.first, ranks)


def _backend_settled(config: PruneConfig) -> PruneConfig:
    """The config, once it is settled whether Triton interprets its kernels: before anything imports Triton."""
    _ = config.backend
    return config


def _inputs(model: "str | Path | nn.Module", text: dict[str, Any], evaluate: Any) -> Inputs:
    """The names of what a run on text reads."""
    name = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "") or type(model).__name__
    named = text | _named(text["dataset"], text["nsamples"], text["seqlen"])
    if evaluate is not None:
        named["evaluate"] = tuple(map(str, [evaluate] if isinstance(evaluate, str | Path) else evaluate))
    return Inputs(model=str(name), **{name: x for name, x in named.items() if x is not None})


def _named(dataset: Dataset | None, nsamples: int | None, seqlen: int | None) -> dict[str, Any]:
    """What Inputs calls the dataset, and the shape of token ids."""
    if dataset is None:
        return {}
    if isinstance(dataset, str | Path):
        return {"dataset": str(dataset)}
    if isinstance(dataset, Mapping):
        return {"dataset": tuple(f"{name}={share}" for name, share in dataset.items())}
    if not isinstance(dataset, Tensor):
        if not isinstance(dataset, Sequence) or not all(isinstance(text, str) for text in dataset):
            raise TypeError("dataset: expected a name, a path, a mapping of names to shares, a list of texts, or token "
                            "ids (windows, seqlen)")  # fmt: skip
        return {"dataset": TEXTS}
    if dataset.ndim != 2:
        raise InputError(f"dataset: expected tokens (windows, seqlen), got shape {tuple(dataset.shape)}")
    shape = dict(zip(("nsamples", "seqlen"), dataset.shape, strict=True))
    for name, value in dict(nsamples=nsamples, seqlen=seqlen).items():
        if value not in (None, shape[name]):
            raise InputError(f"{name} {value}: the tokens have {shape[name]}; leave it out")
    return {"dataset": TOKENS, **shape}
