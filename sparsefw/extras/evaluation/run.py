"""Evaluate checkpoints on tasks of lm-evaluation-harness and on texts, one block in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsefw.caller import bars_wanted, on_cpu_by_default, settings_kept, to_logger
from sparsefw.checkpoint.files import check_writable, durably
from sparsefw.checkpoint.source import Checkpoint, inspect
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import Windows, evaluation_windows, window_length
from sparsefw.errors import InputError, naming, option
from sparsefw.extras.evaluation.metrics import Evaluation, lines, task_records, text_record
from sparsefw.extras.evaluation.rows import request_of
from sparsefw.extras.evaluation.streaming import scores_of
from sparsefw.fields import check_names
from sparsefw.inputs import EvaluationInputs, locate
from sparsefw.model.skeleton import max_seqlen, read_config
from sparsefw.ranks import Ranks, joined_with

# The file in the output folder.
RESULT = "evaluation.json"

# Tokens in a window of a text, unless the user says.
SEQLEN = 2048


@settings_kept()
@on_cpu_by_default()
def evaluate(
    models: str | Path | Sequence[str | Path],
    tasks: str | Sequence[str] = (),
    *,
    log: Callable[[str], None] = to_logger,
    progress: bool | None = True,
    **options: Any,
) -> Evaluation:
    """Evaluate checkpoints, dense or pruned, of which one block is in memory at a time.

    Args:
        models: folders or Hub ids of checkpoints in safetensors.
        tasks: names of tasks, groups and tags of lm-evaluation-harness; "paper": the paper's seven zero-shot tasks.
        log: called with every line of the log; by default they go to the logger "sparsefw", see `prune`.
        progress: whether to show a progress bar; None: in a terminal alone.
        options: other fields of `EvaluationInputs`, such as `texts`, `against` and `output`.

    Returns:
        What was measured.

    Raises:
        InputError: an argument is wrong; the message is one line that names it.
    """
    check_names("evaluate", options, [f.name for f in fields(EvaluationInputs)])
    inputs = EvaluationInputs(models, tasks, **options)  # type: ignore[arg-type]
    names, first = inputs.models, inputs.against
    limits: dict[str, Any] = {"gpu_memory": inputs.gpu_memory, "host_memory": inputs.host_memory}
    limits["progress"] = progress and bars_wanted()
    result = None if inputs.output is None else inputs.output / RESULT
    if result and check_writable(result.parent) and result.exists() and not inputs.overwrite:
        raise InputError(f"{result}: is there already; give {option('overwrite', True)} to replace it")
    with joined_with(log) as (ranks, say):
        ranks.agree({"models": names, "--against": first, "--tasks": inputs.tasks, "--texts": inputs.texts})
        sources = {name: inspect(ranks.local_first(partial(locate, name))) for name in names}
        if first is not None and len({source.folder.resolve() for source in sources.values()}) == 1:
            raise InputError(f"{option('against', first)}: the model itself; name another one, or leave it out")
        windows = _windows(sources, inputs, ranks)
        found: dict[str, Mapping[str, Any]] = {}
        if inputs.tasks:
            check_installed()
            from sparsefw.extras.evaluation.harness import StreamedLM, Tasks

            tasks_found = Tasks(inputs.tasks, inputs.include_path)
            for name, source in sources.items():
                model = StreamedLM(source.folder, log=say, **limits)
                found[name] = tasks_found.results(model, inputs.limit, inputs.num_fewshot)
        records = ranks.broadcast_object(task_records(found, first) if found and ranks.first else [])
        of_texts = []
        for of_text in windows:
            # The last token of a window is predicted, and need not be read.
            requests = [request_of(ids[:1], ids[1:], of_text.seqlen) for ids in of_text.ids.tolist()]
            likelihoods = {
                name: [score.loglikelihood for score in scores_of(source, requests, say=say, ranks=ranks, **limits)]
                for name, source in sources.items()
            }
            of_texts.append(text_record(of_text, likelihoods, first))
        evaluation = Evaluation([*names], first, records, of_texts)
        if result and ranks.first:
            try:
                with naming(result):
                    result.parent.mkdir(parents=True, exist_ok=True)
                durably(result, evaluation.to_json())
            except OSError:
                for line in lines(evaluation):
                    say(line)
                raise
    return evaluation


def check_installed() -> None:
    """Refuse to go on without the harness.

    Raises:
        InputError: it is not installed.
    """
    if not find_spec("lm_eval"):
        raise InputError("lm-evaluation-harness is not installed; pip install -e '.[eval]' brings it")


def _windows(sources: Mapping[str, Checkpoint], inputs: EvaluationInputs, ranks: Ranks) -> list[Windows]:
    """The windows of all texts.

    Raises:
        InputError: models have other tokenizers, or read fewer tokens at once: perplexities cannot be compared.
    """

    def of_model(source: Checkpoint) -> list[Windows]:
        length = window_length(source.folder, inputs.seqlen or SEQLEN, max_seqlen(read_config(source)))
        tokenizer, limit = load_tokenizer(source.folder), inputs.eval_windows
        return [evaluation_windows(tokenizer, text, seqlen=length, limit=limit) for text in inputs.texts]

    first, windows = "", list[Windows]()
    for name, source in sources.items() if inputs.texts else ():
        found = ranks.on_first(partial(of_model, source))
        if not windows:
            first, windows = name, found
        for text, expected in zip(found, windows, strict=True):
            if text.hash != expected.hash:
                raise InputError(
                    f"{name}: reads {text.source} as other tokens than {first}, so that perplexities cannot be "
                    f"compared; evaluate it by itself, or leave out {option('texts')}"
                )
    return windows
