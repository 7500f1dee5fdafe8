"""Evaluate checkpoints on tasks of lm-evaluation-harness and on texts, one block in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsefw import data
from sparsefw.caller import on_cpu_by_default, settings_kept
from sparsefw.checkpoint import Checkpoint, inspect
from sparsefw.checkpoint.files import durably
from sparsefw.data import Windows, load_tokenizer
from sparsefw.errors import InputError, naming
from sparsefw.evaluation.metrics import Evaluation, task_records, text_record
from sparsefw.evaluation.rows import request_of
from sparsefw.evaluation.streaming import locate, scores_of
from sparsefw.flags import check_needs, checked_number, checked_path
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
    texts: str | Path | Sequence[str | Path] = (),
    against: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    seqlen: int | None = None,
    eval_windows: int | None = None,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate checkpoints, dense or pruned, of which one block is in memory at a time.

    Args:
        models: folders or Hub ids of checkpoints in safetensors.
        tasks: names of tasks, groups and tags of lm-evaluation-harness; "paper": the paper's seven zero-shot tasks.
        texts: texts for perplexity, by name or path as for `--eval`.
        against: a checkpoint that all others are compared with, the same documents in pairs.
        limit: most documents of each task; below 1: a share of them.
        num_fewshot: examples before each question; None: as the task says.
        include_path: a folder with more tasks in the harness's format.
        seqlen: tokens in a window of a text; None: 2048.
        eval_windows: most windows of each text; None: all.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a tenth.
        output: folder for evaluation.json; None: nothing is written.
        overwrite: whether an older evaluation.json there is replaced.
        log: called with every line of the log.
        progress: whether to show a progress bar.

    Returns:
        What was measured.

    Raises:
        InputError: an argument is wrong; the message is one line that names it.
        TypeError: what must be a name or a path is neither.
    """
    first = None if against is None else _names("against", [against])[0]
    names = list(dict.fromkeys((*([] if first is None else [first]), *_names("models", models))))
    tasks, texts = _names("tasks", tasks), tuple(dict.fromkeys(_names("texts", texts)))
    if not tasks and not texts:
        raise InputError("--tasks, --eval: neither is given; give tasks, or a text for perplexity")
    check_needs("tasks", bool(tasks), limit=limit, num_fewshot=num_fewshot, include_path=include_path)
    check_needs("evaluate", bool(texts), seqlen=seqlen, eval_windows=eval_windows)
    check_needs("output", output is not None, overwrite=overwrite or None)
    options: dict[str, Any] = {"gpu_memory": gpu_memory, "host_memory": host_memory, "progress": progress}
    for name, value, least, whole in (
        ("limit", limit, 0, False),
        ("gpu_memory", gpu_memory, 0, False),
        ("host_memory", host_memory, 0, False),
        ("num_fewshot", num_fewshot, 0, True),
        ("seqlen", seqlen, 2, True),
        ("eval_windows", eval_windows, 1, True),
    ):
        if value is not None:
            checked_number(name, value, least, None, whole=whole)
    result = None if output is None else checked_path("output", output) / RESULT
    if result and result.exists() and not overwrite:
        raise InputError(f"{result}: is there already; give --overwrite to replace it")
    with joined_with(log) as (ranks, say):
        ranks.agree({"models": names, "--against": first, "--tasks": tasks, "--eval": texts})
        sources = {name: inspect(ranks.local_first(partial(locate, name))) for name in names}
        if first is not None and len({source.folder.resolve() for source in sources.values()}) == 1:
            raise InputError(f"--against {first}: the model itself; compare it with another one, or leave it out")
        windows = _windows(sources, texts, seqlen or SEQLEN, eval_windows, ranks)
        found: dict[str, Mapping[str, Any]] = {}
        if tasks:
            check_installed()
            from sparsefw.evaluation.harness import StreamedLM, Tasks

            loaded = Tasks(tasks, None if include_path is None else checked_path("include_path", include_path))
            for name, source in sources.items():
                found[name] = loaded.results(StreamedLM(source.folder, log=say, **options), limit, num_fewshot)
        records = ranks.broadcast_object(task_records(found, first) if found and ranks.first else [])
        of_texts = []
        for of_text in windows:
            # The last token of a window is predicted, and need not be read.
            requests = [request_of(ids[:1], ids[1:], of_text.seqlen) for ids in of_text.ids.tolist()]
            likelihoods = {
                name: [score.loglikelihood for score in scores_of(source, requests, say=say, ranks=ranks, **options)]
                for name, source in sources.items()
            }
            of_texts.append(text_record(of_text, likelihoods, first))
        evaluation = Evaluation(names, first, records, of_texts)
        if result and ranks.first:
            with naming(result):
                result.parent.mkdir(parents=True, exist_ok=True)
            durably(result, evaluation.to_json())
    return evaluation


def check_installed() -> None:
    """Refuse to go on without the harness.

    Raises:
        InputError: it is not installed.
    """
    if not find_spec("lm_eval"):
        raise InputError("lm-evaluation-harness is not installed; pip install -e '.[eval]' brings it")


def _names(argument: str, given: Any) -> tuple[str, ...]:
    """Names or paths, given as one or as many.

    Raises:
        TypeError: one is neither, such as a model in memory.
    """
    several = [given] if isinstance(given, str | Path) or not isinstance(given, Sequence) else given
    for name in several:
        if not isinstance(name, str | Path):
            raise TypeError(f"{argument}: expected names or paths, got {type(name).__name__}")
    return tuple(map(str, several))


def _windows(
    sources: Mapping[str, Checkpoint], texts: Sequence[str], seqlen: int, limit: int | None, ranks: Ranks
) -> list[Windows]:
    """The windows of all texts.

    Raises:
        InputError: models have other tokenizers, or read fewer tokens at once: perplexities cannot be compared.
    """

    def of_model(source: Checkpoint) -> list[Windows]:
        length = data.window_length(source.folder, seqlen, max_seqlen(read_config(source)))
        tokenizer = load_tokenizer(source.folder)
        return [data.evaluation_windows(tokenizer, text, seqlen=length, limit=limit) for text in texts]

    first, windows = "", list[Windows]()
    for name, source in sources.items() if texts else ():
        found = ranks.on_first(partial(of_model, source))
        if not windows:
            first, windows = name, found
        for text, expected in zip(found, windows, strict=True):
            if text.hash != expected.hash:
                raise InputError(
                    f"{name}: reads {text.source} as other tokens than {first}, so that perplexities cannot be "
                    "compared; evaluate it by itself, or leave out --eval"
                )
    return windows
