"""Prune a model from Python: a checkpoint, or a model in memory, which is changed in place.

Functions create `config.backend` before they import the driver. The backend chooses whether Triton interprets its
kernels, and Triton reads this choice when it is first imported.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsefw.call_inputs import Dataset, batch_inputs, check_model, text_inputs, tokenizer_of
from sparsefw.caller import bars_wanted, on_cpu_by_default, settings_kept, to_logger, unwrapped
from sparsefw.errors import InputError, Say
from sparsefw.fields import check_names, checked_path
from sparsefw.inputs import DEFAULT, Inputs, Output, locate
from sparsefw.memory import this_device
from sparsefw.ranks import Ranks, joined_with
from sparsefw.solver.config import PruneConfig

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedTokenizerBase

    from sparsefw.report.content import Report
    from sparsefw.report.log import Progress
    from sparsefw.solver.layer import LayerResult


@dataclass(frozen=True, repr=False)
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
        """A result for each layer and method, with kept weights and errors."""
        return self.report.layers

    @property
    def perplexity(self) -> dict[str, dict[str, float]]:
        """Perplexity by evaluation text, named as in `evaluate`, then by "dense", by method, and "recovered"."""
        names = dict.fromkeys(self.report.argument("evaluate", tuple))
        return {name: text.perplexity for name, text in zip(names, self.report.evaluation, strict=True)}

    def __repr__(self) -> str:
        """Return the table at the end of a run and the folder of the checkpoint."""
        from sparsefw.report import log

        end = "pruned in place" if self.output is None else f"checkpoint: {self.output}"
        return "\n".join([*log.summary(self.report), end])

    def to_pandas(self) -> "pandas.DataFrame":
        """Make a table with a row for each layer and method, see `LayerResult`.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame([asdict(layer) for layer in self.layers])


@settings_kept()
def prune(
    model: str | Path | nn.Module = DEFAULT,
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
    tokenizer: Any = None,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    overwrite: bool = False,
    restart: bool = False,
    hours: float | None = None,
    log: Say = to_logger,
    progress: "bool | Callable[[Progress], None]" = True,
    **options: Any,
) -> PruneResult:
    """Prune a model, and write the pruned checkpoint with its report.

    After an interruption the same call resumes after the last finished block. If several threads call it, one runs and
    the others wait.

    Args:
        model: folder or Hub id of a checkpoint in safetensors; "default", the built-in model; or a model in memory,
            which is pruned in place: one of transformers or, with `calibration`, any module.
        output: folder for the pruned checkpoint; None only for a model in memory.
        config: how to prune; None makes a config of `options`.
        dataset: calibration text: a name or path as for `--dataset`, or a mapping of names to their shares of the
            windows; "self": the model generates the text; a list, a generator, a datasets.Dataset or a DataLoader of
            texts, of records with `text`, `messages` or `content`, or of tokenized records with `input_ids`; or token
            ids (windows, seqlen). None: c4, or "self" if HF_HUB_OFFLINE is set; for the built-in model its own text.
        calibration: batches in place of a text. A batch is the arguments of the model's forward, as a mapping, a tuple
            or a single tensor, such as pixels, masked tokens or features of sound.
        nsamples, seqlen: number of calibration windows, and tokens in each. None: the shape of the token ids; without
            token ids 256 and 2048 (built-in model: 64 and 128). Tokenized records of one length are windows; records of
            several lengths are joined and cut into windows.
        seed: seed of the draw of the calibration windows.
        evaluate: evaluation texts for perplexity, by name or path. With `calibration`: batches for which the model
            returns a loss; their perplexity is exp of the mean loss.
        eval_windows: most windows of each evaluation text; None: all.
        tokenizer: the model's tokenizer; None: the checkpoint's tokenizer. With `calibration` also a processor of
            images or sound. The tokenizer or processor is written with the model.
        gpu_memory, host_memory: memory limits in GiB; None: the free memory, less a tenth.
        overwrite: whether an older checkpoint in `output` may be replaced.
        restart: whether to discard the finished blocks of an interrupted run.
        hours: hours after which a recovery of the whole model ends; None: no limit.
        log: called with every line of the log. By default lines go to the logger "sparsefw", which shows warnings, and
            every line after `logging.basicConfig(level=logging.INFO)`.
        progress: whether to show a progress bar over the blocks, which huggingface_hub's setting can turn off; or a
            function that is called with a `Progress` for each finished block.
        options: fields of PruneConfig, in place of `config`.

    Returns:
        The report, and the folder of the pruned checkpoint.

    Raises:
        InputError: an argument is wrong; the message is one line that names the argument.
        TypeError: an option is unknown, or two arguments exclude each other.
        FloatingPointError: a layer's error is not finite.
    """
    own = [name for name in inspect.signature(prune).parameters if name != "options"]
    check_names("prune", options, [*own, *(f.name for f in fields(PruneConfig))])
    if config is not None and not isinstance(config, PruneConfig):
        raise InputError(f"config: expected a PruneConfig, got {type(config).__name__}")
    if config is not None and options:
        raise TypeError(f"prune() got a config and {next(iter(options))!r}; set it in the config")
    progress = progress if callable(progress) else progress and bars_wanted()
    # These arguments are refused with `calibration`. The default seed, 0, counts as not given.
    numbers = dict(nsamples=nsamples, seqlen=seqlen, seed=seed or None, eval_windows=eval_windows)
    text = numbers | dict(dataset=dataset)
    of_text = [name for name, value in text.items() if value is not None]
    if calibration is not None and of_text:
        raise TypeError(f"prune() got calibration and {of_text[0]!r}, which is for texts only; leave it out")
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "save_pretrained")):
        raise InputError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    if calibration is None and callable(getattr(tokenizer, "tokenizer", None)):
        raise InputError(f"tokenizer: {type(tokenizer).__name__} is a processor; give its tokenizer: .tokenizer")
    folder = None if output is None else checked_path("output", output)
    places: dict[str, Any] = dict(
        overwrite=overwrite, restart=restart, gpu_memory=gpu_memory, host_memory=host_memory, hours=hours
    )
    if isinstance(model, str | Path) and calibration is None:
        inputs, documents = text_inputs(str(model), dataset, evaluate, **numbers)
        if folder is None:
            raise InputError("output: give a folder for the pruned checkpoint")
        config = config or PruneConfig(**inputs.options | options)
        report = prune_checkpoint(inputs, config, Output(folder, **places), documents, tokenizer, log, progress)
        return PruneResult(report, folder)
    # A compiled model is unwrapped first, so that the model inside gives the name.
    with joined_with(log) as (ranks, say), unwrapped(model) as module:
        batches = documents = None
        if calibration is None:
            name = getattr(module, "name_or_path", "") or type(module).__name__
            inputs, documents = text_inputs(name, dataset, evaluate, **numbers)
        config = (config or PruneConfig(**options)).on(this_device())
        _ = config.backend
        from sparsefw.checkpoint.files import check_output
        from sparsefw.driver.in_memory import run_in_memory
        from sparsefw.driver.job import Job
        from sparsefw.extras.page import write_pages
        from sparsefw.probe import say_kernel

        say_kernel(config, say)
        check_model(module, calibration is not None)
        source = os.path.expanduser(str(getattr(module, "name_or_path", "")))
        if calibration is not None:
            inputs, batches = batch_inputs(type(module).__name__, calibration, evaluate)
        if folder:
            check_output(folder, Path(source) if os.path.isdir(source) else None, overwrite, inputs.paths)
        if not batches and tokenizer is None and not (isinstance(documents, Tensor) and not inputs.evaluate):
            tokenizer = tokenizer_of(module)
        with _folder(folder, ranks) as written, nullcontext() if batches else on_cpu_by_default():
            shown, given = ranks.first and progress, given_arguments(inputs, config, hours)
            target = Output(written, **places)
            job = Job(inputs, config, target, documents, tokenizer, None, say, shown, ranks, given, write_pages)
            report = run_in_memory(module, job, batches, folder is not None)
    # Without an output the run wrote to a temporary folder, which the report does not name.
    return PruneResult(report if folder else replace(report, arguments=report.arguments | {"output": None}), folder)


@settings_kept()
@on_cpu_by_default()
def prune_checkpoint(
    inputs: Inputs,
    config: PruneConfig,
    output: Output,
    dataset: Iterable[Any] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    log: Say = to_logger,
    progress: "bool | Callable[[Progress], None] | None" = None,
) -> "Report":
    """Prune a checkpoint, write the pruned checkpoint with its report, and return the report.

    Args:
        inputs: the model and the texts, by name.
        config: how to prune.
        output: where to write, and the memory limits.
        dataset: calibration data without a name: documents, or token ids (windows, seqlen); None: `inputs` names the
            calibration text.
        tokenizer, log, progress: as for `prune`. If progress is None, a bar is shown only in a terminal.

    Raises:
        InputError, FloatingPointError: see `prune`.
    """
    config = config.on(this_device())
    _ = config.backend
    from sparsefw.driver.job import Job
    from sparsefw.driver.run import run_job
    from sparsefw.extras.page import write_pages
    from sparsefw.probe import say_kernel

    with joined_with(log) as (ranks, say):
        say_kernel(config, say)
        folder = ranks.local_first(lambda: locate(inputs.model))
        shown, given = ranks.first and progress, given_arguments(inputs, config, output.hours)
        job = Job(inputs, config, output, dataset, tokenizer, folder, say, shown, ranks, given, write_pages)
        return run_job(job)


def given_arguments(inputs: Inputs, config: PruneConfig, hours: float | None) -> dict[str, Any]:
    """Find by name the arguments that differ from the defaults.

    The dataset is included even if it is the default, since its default depends on the network. Only for the built-in
    model the default dataset is left out.
    """
    defaults = asdict(Inputs(model=inputs.model)) | {"model": DEFAULT}
    if not inputs.built_in:
        defaults["dataset"] = None
    given = {name: value for name, value in asdict(inputs).items() if value != defaults[name]}
    given |= {name: value for name, value in config.given.items() if value != inputs.options.get(name)}
    return given if hours is None else given | {"hours": hours}


@contextmanager
def _folder(output: Path | None, ranks: Ranks) -> Iterator[Path]:
    """Yield the folder that all ranks write to: the output, or a temporary folder."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="sparsefw-") as scratch:
        try:
            yield ranks.broadcast_object(Path(scratch) / "pruned")
        except BaseException as error:
            # Drop notes that say that the run can be resumed: the temporary folder is deleted.
            getattr(error, "__notes__", []).clear()
            raise
