"""Evaluate checkpoints on tasks of lm-evaluation-harness and on texts, one block in memory at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsefw.caller import bars_wanted, on_cpu_by_default, settings_kept, to_logger
from sparsefw.checkpoint.files import check_writable, durably
from sparsefw.checkpoint.source import Checkpoint, inspect, sample
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import Windows, evaluation_windows, window_length
from sparsefw.errors import InputError, Say, naming, option
from sparsefw.extras.evaluation.metrics import Evaluation, TaskRecord, lines, task_records, text_record
from sparsefw.extras.evaluation.streaming import window_losses_of
from sparsefw.fields import check_names
from sparsefw.inputs import EvaluationInputs, locate
from sparsefw.model.skeleton import max_seqlen, read_config
from sparsefw.ranks import Ranks, joined_with

# Name of the file in the output folder.
RESULT = "evaluation.json"

# Default number of tokens in a window of a text.
SEQLEN = 2048


@settings_kept()
@on_cpu_by_default()
def evaluate(
    models: str | Path | Sequence[str | Path],
    tasks: str | Sequence[str] = (),
    *,
    log: Say = to_logger,
    progress: bool | None = True,
    **options: Any,
) -> Evaluation:
    """Evaluate checkpoints, dense or pruned, with one block in memory at a time.

    Args:
        models: folders or Hub ids of checkpoints in safetensors.
        tasks: names of tasks, groups and tags of lm-evaluation-harness; "paper": the paper's seven zero-shot tasks.
        log: called with every line of the log; by default, lines go to the logger "sparsefw", see `prune`.
        progress: whether to show a progress bar; None: only in a terminal.
        options: other fields of `EvaluationInputs`, such as `texts`, `against` and `output`.

    Returns:
        The metrics of all models.

    Raises:
        InputError: an argument is wrong; the message is one line and names the argument.
    """
    check_names("evaluate", options, [f.name for f in fields(EvaluationInputs)])
    inputs = EvaluationInputs(models, tasks, **options)  # type: ignore[arg-type]
    if inputs.output:
        # Checked before the evaluation, so that its result can be written.
        check_writable(inputs.output)
        result = inputs.output / RESULT
        if result.exists() and not inputs.overwrite:
            raise InputError(f"{result}: is there already; give {option('overwrite', True)} to replace it")
    with joined_with(log) as (ranks, say):
        # Limits of memory may differ, and only rank 0 writes.
        own = {"gpu_memory", "host_memory", "output", "overwrite"}
        ranks.agree({option(name): value for name, value in vars(inputs).items() if name not in own})
        sources = {name: inspect(ranks.local_first(partial(locate, name))) for name in inputs.models}
        if not ranks.alone:
            ranks.agree({f"the digest of the weights of {name}": sample(source) for name, source in sources.items()})
        if inputs.against is not None and len({source.folder.resolve() for source in sources.values()}) == 1:
            raise InputError(
                f"{option('against', inputs.against)}: the model itself; name another one, or leave it out"
            )
        texts = _windows(sources, inputs, ranks)
        limits: dict[str, Any] = dict(
            gpu_memory=inputs.gpu_memory, host_memory=inputs.host_memory, progress=progress and bars_wanted()
        )
        records = ranks.broadcast_object(_task_records(sources, inputs, log=say, **limits))
        of_texts = []
        for windows in texts:
            losses = {
                name: window_losses_of(source, windows, ranks, say=say, **limits) for name, source in sources.items()
            }
            of_texts.append(text_record(windows, losses, inputs.against))
        evaluation = Evaluation([*inputs.models], inputs.against, records, of_texts)
        if inputs.output and ranks.first:
            _write(evaluation, result, say)
    return evaluation


def _write(evaluation: Evaluation, result: Path, say: Say) -> None:
    """Write evaluation.json. If writing fails, log the table, so that no result is lost."""
    try:
        with naming(result):
            result.parent.mkdir(parents=True, exist_ok=True)
        durably(result, evaluation.to_json())
    except OSError:
        for line in lines(evaluation):
            say(line)
        raise


def _task_records(sources: Mapping[str, Checkpoint], inputs: EvaluationInputs, **options: Any) -> list[TaskRecord]:
    """Compute the metrics of all tasks; returns an empty list on all ranks but the first.

    Raises:
        InputError: the harness is not installed, or as for `harness.Tasks`.
    """
    if not inputs.tasks:
        return []
    check_installed()
    from sparsefw.extras.evaluation.harness import StreamedLM, Tasks

    tasks = Tasks(inputs.tasks, inputs.include_path)
    found = {
        name: tasks.results(StreamedLM(source.folder, **options), inputs.limit, inputs.num_fewshot)
        for name, source in sources.items()
    }
    return task_records(found, inputs.against) if all(found.values()) else []


def check_installed() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        InputError: the harness is not installed.
    """
    if not find_spec("lm_eval"):
        raise InputError("lm-evaluation-harness is not installed; pip install -e '.[eval]' brings it")


def _windows(sources: Mapping[str, Checkpoint], inputs: EvaluationInputs, ranks: Ranks) -> list[Windows]:
    """Read the windows of all texts.

    Raises:
        InputError: two models split a text into different windows, so that perplexities cannot be compared.
    """

    def of_model(source: Checkpoint) -> list[Windows]:
        length = window_length(source.folder, inputs.seqlen or SEQLEN, max_seqlen(read_config(source)))
        tokenizer, limit = load_tokenizer(source.folder), inputs.eval_windows
        return [evaluation_windows(tokenizer, text, seqlen=length, limit=limit) for text in inputs.texts]

    if not inputs.texts:
        return []
    by_model = {name: ranks.on_first(partial(of_model, source)) for name, source in sources.items()}
    first, expected = next(iter(by_model.items()))
    for name, found in by_model.items():
        for text, of_first in zip(found, expected, strict=True):
            if text.seqlen != of_first.seqlen:
                one = f"give {option('seqlen', min(text.seqlen, of_first.seqlen))}"
                raise InputError(f"{name}: windows of {text.seqlen} tokens, {first}: of {of_first.seqlen}; {one}")
            if text.hash != of_first.hash:
                raise InputError(
                    f"{name}: reads {text.source} as other tokens than {first}, so that perplexities cannot be "
                    f"compared; evaluate it by itself, or leave out {option('texts')}"
                )
    return expected
