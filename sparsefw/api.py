"""`prune` prunes a model from Python: a checkpoint, or a model in memory, whose layers are changed in place.

The driver is imported inside of functions, after `config.backend` is made. Triton decides at its first import whether
it interprets its kernels, and that settles it.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsefw.caller import bars_wanted, on_cpu_by_default, settings_kept, to_logger, unwrapped
from sparsefw.data.text import TEXTS, TOKENS
from sparsefw.errors import InputError, option, shown
from sparsefw.fields import check_names, checked_path
from sparsefw.inputs import DEFAULT, Inputs, Output, locate
from sparsefw.memory import this_device
from sparsefw.ranks import Ranks, joined_with
from sparsefw.solver.config import PruneConfig

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedTokenizerBase

    from sparsefw.data.batches import Batches
    from sparsefw.driver.job import Job
    from sparsefw.report.content import Report
    from sparsefw.report.log import Progress
    from sparsefw.solver.layer import LayerResult

# Calibration data, see `prune`.
Dataset = str | Path | Mapping[Any, Any] | Iterable[Any] | Tensor

# Kinds of calibration data, for messages.
EXPECTED = "a name or path, a mapping of these to shares, texts, tokens, or records of text, messages or input_ids"


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
        """A result for each layer and method: kept weights and errors."""
        return self.report.layers

    @property
    def perplexity(self) -> dict[str, dict[str, float]]:
        """Perplexity by evaluation text, named as in `evaluate`, then by "dense" and by method."""
        names = dict.fromkeys(self.report.argument("evaluate", tuple))
        return {name: text.perplexity for name, text in zip(names, self.report.evaluation, strict=True)}

    def __repr__(self) -> str:
        """The table at the end of a run, and where the checkpoint is."""
        from sparsefw.report import log

        end = "pruned in place" if self.output is None else f"checkpoint: {self.output}"
        return "\n".join([*log.summary(self.report), end])

    def to_pandas(self) -> "pandas.DataFrame":
        """The table of layers, a row for each layer and method, see `LayerResult`; needs pandas.

        Raises:
            ImportError: it is not installed.
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
    packed: str | Path | None = None,
    log: Callable[[str], None] = to_logger,
    progress: "bool | Callable[[Progress], None]" = True,
    **options: Any,
) -> PruneResult:
    """Prune a model, and write the pruned checkpoint with its report.

    After an interruption the same call goes on after the last finished block. Threads of one process take turns.

    Args:
        model: folder or Hub id of a checkpoint in safetensors; "default", the built-in model; a transformers model in
            memory, or, with `calibration`, any module in memory: these are pruned in place.
        output: folder for the pruned checkpoint; None only for a model in memory.
        config: how to prune; None makes a config of `options`.
        dataset: calibration text: a name or path as for `--dataset`, or a mapping of several with the share of the
            windows that each has; "self": the model writes it; a list, a generator, a datasets.Dataset or a DataLoader
            of texts, of records with `text`, `messages` or `content`, or of tokenized ones with `input_ids`; or token
            ids (windows, seqlen). None: c4, "self" if HF_HUB_OFFLINE is set; for the built-in model its own text.
        calibration: in place of a text: for each batch the arguments of the model's forward, as a mapping, a tuple or
            a single tensor. Pixels, masked tokens, features of sound: whatever a stack of blocks is made for.
        nsamples, seqlen: number of calibration windows, and tokens in each. None: the shape of the token ids, else 256
            and 2048 (built-in model: 64 and 128). Tokenized records of one length are windows; others are cut from
            them joined.
        seed: seed of the draw of the calibration windows.
        evaluate: evaluation texts for perplexity, by name or path; with `calibration` batches for which the model
            returns a loss, whose perplexity is exp of the mean loss.
        eval_windows: most windows of each evaluation text; None: all.
        tokenizer: the model's tokenizer; None: the one beside the checkpoint. With `calibration` it is written beside
            the model, and may be a processor, too: of images, sound, or several.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a tenth.
        overwrite: whether an older checkpoint in `output` may be replaced.
        restart: whether to discard what an interrupted run has finished.
        packed: folder for a packed copy of the output, see `packing`.
        log: called with every line of the log. By default they go to the logger "sparsefw": warnings are shown, and
            all after `logging.basicConfig(level=logging.INFO)`.
        progress: whether to show a progress bar over the blocks, unless bars are turned off for huggingface_hub; or
            what is called with a record of each finished block, a `Progress`.
        options: fields of PruneConfig, in place of `config`.

    Returns:
        The report, and the folder of the pruned checkpoint.

    Raises:
        InputError: an argument is wrong; the message is one line that names it.
        TypeError: an option is unknown, or stands beside a config; or an argument is of another type.
        FloatingPointError: a layer's error is not finite.
    """
    own = [name for name in inspect.signature(prune).parameters if name != "options"]
    check_names("prune", options, [*own, *(f.name for f in fields(PruneConfig))])
    if config is not None and not isinstance(config, PruneConfig):
        raise TypeError(f"config: expected a PruneConfig, got {type(config).__name__}")
    if config is not None and options:
        raise TypeError(f"prune() got a config and {next(iter(options))!r}, which belongs into it")
    progress = progress if callable(progress) else progress and bars_wanted()
    # Batches are not drawn: a seed would have no effect there. 0 is the default.
    numbers = dict(nsamples=nsamples, seqlen=seqlen, seed=seed or None, eval_windows=eval_windows)
    text = numbers | dict(dataset=dataset)
    of_text = [name for name, value in text.items() if value is not None]
    if calibration is not None and of_text:
        raise TypeError(f"prune() got calibration and {of_text[0]!r}, which belongs to a text")
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "save_pretrained")):
        raise TypeError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    folder = None if output is None else checked_path("output", output)
    if packed is not None:
        packed = checked_path("packed", packed)
        if folder is None:
            raise InputError("packed: a copy of the output, and there is none; give output, too")
    places: dict[str, Any] = dict(overwrite=overwrite, restart=restart, gpu_memory=gpu_memory, host_memory=host_memory)
    places |= dict(packed=packed)
    if isinstance(model, str | Path) and calibration is None:
        inputs, documents = _inputs(str(model), dataset, evaluate, **numbers)
        if folder is None:
            raise InputError("output: give a folder for the pruned checkpoint")
        config = config or PruneConfig(**inputs.options | options)
        report = prune_checkpoint(inputs, config, Output(folder, **places), documents, tokenizer, log, progress)
        return PruneResult(report, folder)
    # Names a model as what torch.compile was given.
    with joined_with(log) as (ranks, say), unwrapped(model) as module:
        batches = documents = None
        if calibration is None:
            name = getattr(module, "name_or_path", "") or type(module).__name__
            inputs, documents = _inputs(name, dataset, evaluate, **numbers)
        config = (config or PruneConfig(**options)).on(this_device())
        _ = config.backend
        from sparsefw.checkpoint.files import check_output
        from sparsefw.driver.in_memory import run_in_memory
        from sparsefw.driver.job import Job
        from sparsefw.probe import say_kernel

        say_kernel(config, say)
        _check(module, calibration is not None)
        source = os.path.expanduser(str(getattr(module, "name_or_path", "")))
        for path in filter(None, (folder, packed) if os.path.isdir(source) else ()):
            check_output(path, Path(source), overwrite)
        if calibration is not None:
            inputs, batches = _batches(type(module).__name__, calibration, evaluate)
        elif tokenizer is None and not (isinstance(documents, Tensor) and not inputs.evaluate):
            tokenizer = _tokenizer_of(module)
        with _folder(folder, ranks) as written, nullcontext() if batches else on_cpu_by_default():
            shown = ranks.first and progress
            job = Job(inputs, config, Output(written, **places), documents, tokenizer, None, say, shown, ranks)
            with _packing(job):
                report = run_in_memory(module, job, batches, folder is not None)
    # A temporary folder is gone.
    return PruneResult(report if folder else replace(report, arguments=report.arguments | {"output": None}), folder)


@settings_kept()
@on_cpu_by_default()
def prune_checkpoint(
    inputs: Inputs,
    config: PruneConfig,
    output: Output,
    dataset: Iterable[Any] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    log: Callable[[str], None] = to_logger,
    progress: "bool | Callable[[Progress], None] | None" = None,
) -> "Report":
    """Prune a checkpoint, and write the pruned one with its report, whose content is returned.

    Args:
        inputs: names of what is read.
        config: how to prune.
        output: where to write, and the memory to take.
        dataset: calibration data without a name: documents, or token ids (windows, seqlen); None: `inputs` names it.
        tokenizer, log, progress: see `prune`; progress None: a bar in a terminal alone.

    Raises:
        InputError, FloatingPointError: see `prune`.
    """
    config = config.on(this_device())
    _ = config.backend
    from sparsefw.driver.job import Job
    from sparsefw.driver.run import run_job
    from sparsefw.probe import say_kernel

    with joined_with(log) as (ranks, say):
        say_kernel(config, say)
        folder = ranks.local_first(lambda: locate(inputs.model))
        job = Job(inputs, config, output, dataset, tokenizer, folder, say, ranks.first and progress, ranks)
        with _packing(job):
            return run_job(job)


@contextmanager
def _packing(job: "Job") -> Iterator[None]:
    """Pack what is written inside, if a packed copy is wanted."""
    folder, packed = job.output.folder, job.output.packed
    if packed is None:
        yield
        return
    from sparsefw.checkpoint.files import check_output
    from sparsefw.packing import pack_folder

    for read in filter(None, (job.folder, folder)):
        check_output(packed, read, job.output.overwrite, job.inputs.paths)
    yield
    if job.ranks.first:
        try:
            pack_folder(folder, packed, overwrite=job.output.overwrite, restart=job.output.restart)
        except BaseException as error:
            # Those of the packed copy say that the same command goes on.
            getattr(error, "__notes__", []).clear()
            goes_on = "" if isinstance(error, InputError) else f"; sparsefw pack {folder} {packed} goes on"
            error.add_note(f"{folder} is complete{goes_on}")
            raise
    job.ranks.barrier()


def _inputs(model: str, dataset: Any, evaluate: Any, **numbers: int | None) -> tuple[Inputs, Iterable[Any] | None]:
    """The names of what a run on text reads, and the calibration data that has none.

    Args:
        model: name of the model.
        dataset, evaluate: as for `prune`.
        numbers: nsamples, seqlen, seed and eval_windows; None: not given.
    """
    named: dict[str, Any] = numbers | {"evaluate": evaluate}
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
            raise InputError(f"{option(name, numbers[name])}: the tokens have {value}; leave it out")
    return replace(inputs, dataset=(TOKENS,), **shape), dataset


def _texts_or_tokens(dataset: Any, inputs: Inputs, seqlen: int | None) -> Iterable[Any]:
    """Texts or records with text, unchanged; or windows of records with tokens.

    Raises:
        TypeError: they are something else.
        InputError: there are none, they are names, or their tokens make no windows.
    """
    from sparsefw.data.text import NAMES, TEXT_COLUMNS
    from sparsefw.data.windows import windows_of_records

    kind = type(dataset).__name__
    # A data frame yields the names of its columns.
    if not isinstance(dataset, Iterable) or kind in ("DataFrame", "bytes"):
        raise TypeError(f"dataset: got {kind}, expected {EXPECTED}")
    # Columns, as tokenizers and slices of datasets return them, are a batch of records.
    records = iter([dataset] if isinstance(dataset, Mapping) else dataset)
    item = inner = next(records, None)
    if item is None:
        raise InputError(f"dataset: the {kind} has no record")
    records, columns = chain([item], records), [*item] if isinstance(item, Mapping) else []
    while isinstance(inner, list | tuple) and inner:
        inner = inner[0]
    texts = isinstance(inner, str) or bool({*TEXT_COLUMNS} & {*columns})
    rows = hasattr(item, "ndim") or (inner is not item and isinstance(inner, Integral))
    if "input_ids" in columns or (rows and not texts):
        return windows_of_records(records, TOKENS, nsamples=inputs.nsamples, seqlen=seqlen, seed=inputs.seed)
    if isinstance(item, str) and (item in NAMES or os.path.isfile(item)):
        raise InputError(f"dataset: {shown(item)} is a text's name; give it alone, or a mapping of names to shares")
    if texts:
        return records
    of = kind if item is dataset else f"{kind} of {type(item).__name__}"
    of += f" with {shown(', '.join(map(str, columns)))}" if columns else ""
    raise TypeError(f"dataset: got {of}, expected {EXPECTED}")


def _batches(model: str, calibration: Iterable[Any], evaluate: Any) -> "tuple[Inputs, tuple[Batches, Batches | None]]":
    """What a run on batches reads, and the batches: those to calibrate on, and to evaluate on."""
    from sparsefw.data.batches import BATCHES, batches_of

    batches = batches_of(calibration, "calibration")
    evaluated = None if evaluate is None else batches_of(evaluate, "evaluate")
    texts = (BATCHES,) if evaluated else ()
    return Inputs(model=model, dataset=(BATCHES,), nsamples=batches.n, evaluate=texts), (batches, evaluated)


def _check(model: Any, on_batches: bool) -> None:
    """Refuse what is no model in memory, and a model with a weight that cannot be written to where it is.

    The library of adapters writes these alone, and merged later they fill the zeros. Weights that a library has
    offloaded are elsewhere.

    Raises:
        InputError: the message names the weight.
    """
    from transformers import PreTrainedModel

    from sparsefw.packed import PackedLinear

    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__module__.split(".")[0] == "peft":
            raise InputError(f"{name or 'model'}: is an adapter of peft; merge the adapters first: merge_and_unload()")
        if isinstance(module, PackedLinear):
            raise InputError(f"{name}: is packed; model.dequantize() makes it dense")
    if not isinstance(model, nn.Module if on_batches else PreTrainedModel):
        expected = "a folder, a Hub id or a transformers model; any other module needs batches: calibration="
        loads = f": AutoModel.from_pretrained({str(model)!r})" if isinstance(model, str | Path) else ""
        expected = f"a module in memory, since calibration= is given{loads}" if on_batches else expected
        raise InputError(f"model: got {type(model).__name__}, expected {expected}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"{name}: is on the meta device, without data; give a model with its weights, or a language model as "
                "the folder or Hub id of its checkpoint, which is read block by block"
            )


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


def _tokenizer_of(model: Any) -> "PreTrainedTokenizerBase":
    """The tokenizer beside the checkpoint that a model of transformers was loaded from.

    Raises:
        InputError: there is none.
    """
    from sparsefw.checkpoint.source import SMALL_FILES, locate
    from sparsefw.data.tokens import load_tokenizer

    try:
        if model.name_or_path:
            return load_tokenizer(locate(model.name_or_path, SMALL_FILES))
    except InputError as error:
        raise InputError(f"tokenizer: the model in memory has none ({error}); give tokenizer=") from error
    raise InputError("tokenizer: the model in memory was not loaded from a checkpoint that has one; give tokenizer=")
