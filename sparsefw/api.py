"""`prune` prunes a model from Python. The command line calls it.

The driver is imported inside `prune`, after the config is made. Triton decides at its first import whether it
interprets its kernels, and the config settles that.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from sparsefw.errors import InputError, printable
from sparsefw.flags import checked_path
from sparsefw.inputs import DEFAULT, DEFAULT_MODEL, Inputs, config_for
from sparsefw.ranks import Ranks, joined
from sparsefw.solver.config import PruneConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sparsefw.report import Report
    from sparsefw.solver import LayerResult

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


def prune(
    model: "str | Path | nn.Module" = DEFAULT,
    output: str | Path | None = None,
    config: PruneConfig | None = None,
    *,
    dataset: str | Path | Sequence[str] | Tensor | None = None,
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

    After an interruption the same call goes on after the last finished block.

    Args:
        model: folder or Hub id of a checkpoint in safetensors; "default", the embedded model; a transformers model in
            memory, which is pruned in place through a checkpoint in a temporary folder; or, with `calibration`, any
            module in memory, which is pruned in place.
        output: folder for the pruned checkpoint; None only for a model in memory.
        config: how to prune; None makes a config of `options`.
        dataset: calibration text: a name or path as for `--dataset`, a list of documents, or token ids (windows,
            seqlen). None: c4, or the embedded text for the embedded model.
        calibration: in place of a text: for each batch the arguments of the model's forward, as a mapping, a tuple or
            a single tensor. Pixels, masked tokens, features of sound: whatever a stack of blocks is made for.
        nsamples, seqlen: number of calibration windows, and tokens in each. None: the shape of the token ids, else 256
            and 2048 (embedded model: 64 and 128).
        seed: seed of the draw of the calibration windows.
        evaluate: evaluation texts for perplexity, by name or path; with `calibration` batches for which the model
            returns a loss, whose perplexity is exp of the mean loss.
        eval_windows: most windows of each evaluation text; None: all.
        tokenizer: the model's tokenizer; None: the one beside the checkpoint.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a margin.
        overwrite: whether an older checkpoint in `output` may be replaced.
        restart: whether to discard what an interrupted run has finished.
        log: called with every line of the log.
        progress: whether to show a progress bar.
        options: fields of PruneConfig, in place of `config`.

    Returns:
        The report, and the folder of the pruned checkpoint.

    Raises:
        InputError: an argument is wrong; the message is one line that names it.
        TypeError: an option is unknown, or stands beside a config.
        FloatingPointError: a layer's error is not finite.
    """
    if unknown := [name for name in options if name not in {f.name for f in fields(PruneConfig)}]:
        raise TypeError(f"prune() got an unexpected keyword argument {unknown[0]!r}")
    if config is not None and options:
        raise TypeError(f"prune() got a config and {next(iter(options))!r}, which belongs into it")
    if config is not None and not isinstance(config, PruneConfig):
        raise TypeError(f"config: expected a PruneConfig, got {type(config).__name__}")

    output_folder = None if output is None else checked_path("output", output)
    places: dict[str, Any] = dict(overwrite=overwrite, restart=restart, gpu_memory=gpu_memory, host_memory=host_memory)
    of_text = dict(dataset=dataset, nsamples=nsamples, seqlen=seqlen, eval_windows=eval_windows, tokenizer=tokenizer)
    if calibration is not None:
        _check_unused(of_text)
        config = config or PruneConfig(**options)
        with _joined(log, progress) as told:
            return _prune_on_batches(model, calibration, evaluate, config, output_folder, places, told)
    source, nsamples, seqlen = _named(dataset, nsamples, seqlen)
    known: dict[str, Any] = dict(
        dataset=source, nsamples=nsamples, seqlen=seqlen, evaluate=_names(evaluate), eval_windows=eval_windows
    )
    given = {name: value for name, value in known.items() if value is not None}
    inputs = Inputs(model=_name(model), seed=seed, **given)
    if config is None:
        config = config_for(inputs, options)
    # Settles whether Triton interprets its kernels, before anything imports Triton.
    _ = config.backend

    from sparsefw.driver import CheckpointJob, Output, run_job

    if isinstance(model, str | Path) and output_folder is None:
        raise InputError("output: where the pruned checkpoint goes is left out")
    text = dataset if source in (TEXTS, TOKENS) and not isinstance(dataset, str | Path) else None
    with _joined(log, progress) as told:

        def run(folder: Path, output: Path, tokenizer: "PreTrainedTokenizerBase | None") -> "Report":
            destination = Output(output, **places)
            return run_job(CheckpointJob(inputs, config, destination, folder, text, tokenizer), *told)

        if isinstance(model, str | Path):
            assert output_folder is not None
            folder = told.ranks.first_here(lambda: _locate(inputs))
            return PruneResult(run(folder, output_folder, tokenizer), output_folder)

        from sparsefw import in_memory

        tokenized = isinstance(dataset, Tensor) and not inputs.evaluate
        report = in_memory.prune_in_place(
            model, run, config.method, output_folder, overwrite, tokenizer, tokenized, told.ranks
        )
        return PruneResult(report, output_folder)


class _Told(NamedTuple):
    """What a run tells the user, and the processes that share it: only one of them speaks."""

    say: Callable[[str], None]
    progress: bool
    ranks: Ranks


@contextmanager
def _joined(log: Callable[[str], None], progress: bool) -> Iterator[_Told]:
    with joined() as ranks:

        def say(line: str) -> None:
            if ranks.first:
                # Names in it come from the checkpoint.
                log(printable(line))

        yield _Told(say, progress and ranks.first, ranks)


def _check_unused(of_text: dict[str, Any]) -> None:
    """Refuse arguments of a text beside batches."""
    if given := [name for name, value in of_text.items() if value is not None]:
        raise TypeError(f"prune() got calibration and {given[0]!r}, which belongs to a text")


def _prune_on_batches(
    model: Any,
    calibration: Iterable[Any],
    evaluation: Any,
    config: PruneConfig,
    output: Path | None,
    places: dict[str, Any],
    told: _Told,
) -> PruneResult:
    # As in `prune`.
    _ = config.backend

    from sparsefw import in_memory

    report = in_memory.prune_on_batches(model, calibration, evaluation, config, output, places, *told)
    return PruneResult(report, output)


def _named(
    dataset: str | Path | Sequence[str] | Tensor | None, nsamples: int | None, seqlen: int | None
) -> tuple[str | None, int | None, int | None]:
    """The name of the calibration text, nsamples and seqlen. Token ids have both numbers in their shape."""
    if dataset is None or isinstance(dataset, str | Path):
        return None if dataset is None else str(dataset), nsamples, seqlen
    if not isinstance(dataset, Tensor):
        if not isinstance(dataset, Sequence) or not all(isinstance(text, str) for text in dataset):
            raise TypeError("dataset: expected a name, a path, a list of texts, or token ids (windows, seqlen)")
        return TEXTS, nsamples, seqlen
    if dataset.ndim != 2:
        raise InputError(f"dataset: expected tokens (windows, seqlen), got shape {tuple(dataset.shape)}")
    for name, value, size in zip(("nsamples", "seqlen"), (nsamples, seqlen), dataset.shape, strict=True):
        if value not in (None, size):
            raise InputError(f"{name} {value}: the tokens have {size}; leave it out")
    return TOKENS, *dataset.shape


def _names(texts: Any) -> tuple[str, ...] | None:
    if texts is None:
        return None
    names = [texts] if isinstance(texts, str | Path) else texts
    if not isinstance(names, Sequence) or not all(isinstance(name, str | Path) for name in names):
        raise TypeError("evaluate: expected names or paths of texts")
    return tuple(map(str, names))


def _name(model: "str | Path | nn.Module") -> str:
    if isinstance(model, str | Path):
        return str(model)
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def _locate(inputs: Inputs) -> Path:
    from sparsefw import checkpoint

    return DEFAULT_MODEL if inputs.embedded else checkpoint.locate(inputs.model)
