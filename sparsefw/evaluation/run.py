"""Evaluate checkpoints on tasks of lm-evaluation-harness and on texts, one block in memory at a time."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsefw import data
from sparsefw.caller import on_cpu_by_default, settings_kept
from sparsefw.checkpoint import Checkpoint, inspect
from sparsefw.data import Windows, load_tokenizer
from sparsefw.errors import InputError, naming
from sparsefw.evaluation.metrics import Evaluation, task_records, text_record
from sparsefw.evaluation.rows import request_of
from sparsefw.evaluation.streaming import locate, scores_of
from sparsefw.flags import check_needs, checked_number, checked_path
from sparsefw.model import read_config
from sparsefw.model.skeleton import max_seqlen
from sparsefw.ranks import Ranks, joined_with

if TYPE_CHECKING:
    from sparsefw.evaluation.harness import Tasks

# The file in the output folder.
RESULT = "evaluation.json"

# The least values of whole numbers.
LEAST = {"num_fewshot": 0, "seqlen": 2, "eval_windows": 1}

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
    names = list(dict.fromkeys((*(() if against is None else _names("against", [against])), *_names("models", models))))
    tasks, texts = _names("tasks", tasks), _names("texts", texts)
    if not tasks and not texts:
        raise InputError("--tasks, --eval: neither is given; give tasks, or a text for perplexity")
    check_needs("tasks", bool(tasks), limit=limit, num_fewshot=num_fewshot, include_path=include_path)
    check_needs("evaluate", bool(texts), seqlen=seqlen, eval_windows=eval_windows)
    check_needs("output", output is not None, overwrite=overwrite or None)
    of_memory = {"gpu_memory": gpu_memory, "host_memory": host_memory}
    for name, value in {"limit": limit, **of_memory}.items():
        if value is not None:
            checked_number(name, value, 0, None)
    for name, count in {"num_fewshot": num_fewshot, "seqlen": seqlen, "eval_windows": eval_windows}.items():
        if count is not None:
            checked_number(name, count, LEAST[name], None, whole=True)
    result = None if output is None else _result_path(checked_path("output", output), overwrite)
    with joined_with(log) as (ranks, say):
        asked = {"tasks": tasks, "limit": limit, "num_fewshot": num_fewshot, "include_path": str(include_path)}
        first = None if against is None else str(against)
        ranks.agree({"models": names, "--against": first, "--eval": texts, **asked})
        folders = {name: ranks.local_first(partial(locate, name)) for name in names}
        if against is not None and len({folder.resolve() for folder in folders.values()}) == 1:
            raise InputError(f"--against {against}: the model itself; compare it with another one, or leave it out")
        loaded = _tasks(tasks, include_path) if tasks else None
        found: dict[str, Mapping[str, Any]] = {}
        windows: list[Windows] = []
        likelihoods: list[dict[str, list[float]]] = [{} for _ in texts]
        for name, folder in folders.items():
            source = inspect(folder)
            of_model = _windows(source, texts, seqlen or SEQLEN, eval_windows, ranks)
            windows = windows or of_model
            for n, of_text in enumerate(of_model):
                if of_text.hash != windows[n].hash:
                    raise InputError(
                        f"{name}: reads {of_text.source} as other tokens than {names[0]}, so that perplexities cannot "
                        "be compared; evaluate it by itself, or leave out --eval"
                    )
                # The last token of a window is predicted, and need not be read.
                requests = [request_of(ids[:1], ids[1:], of_text.seqlen) for ids in of_text.ids.tolist()]
                scores = scores_of(source, requests, **of_memory, say=say, progress=progress, ranks=ranks)
                likelihoods[n][name] = [score.loglikelihood for score in scores]
            if loaded:
                from sparsefw.evaluation.harness import StreamedLM

                model = StreamedLM(folder, gpu_memory=gpu_memory, host_memory=host_memory, log=say, progress=progress)
                found[name] = loaded.results(model, limit, num_fewshot)
        evaluation = Evaluation(
            names,
            first,
            ranks.broadcast_object(task_records(found, first) if found and ranks.first else []),
            [text_record(*of_text, first) for of_text in zip(windows, likelihoods, strict=True)],
        )
        if result and ranks.first:
            _write(result, evaluation.to_json())
    return evaluation


def check_installed() -> None:
    """Refuse to go on without the harness.

    Raises:
        InputError: it is not installed.
    """
    if not find_spec("lm_eval"):
        raise InputError("lm-evaluation-harness is not installed; pip install -e '.[eval]' brings it")


def _tasks(names: Sequence[str], include_path: str | Path | None) -> "Tasks":
    """The harness's tasks.

    Raises:
        InputError: the harness is not installed; or as `Tasks`.
    """
    check_installed()
    from sparsefw.evaluation.harness import Tasks

    return Tasks(names, None if include_path is None else checked_path("include_path", include_path))


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


def _result_path(folder: Path, overwrite: bool) -> Path:
    """The file of the result.

    Raises:
        InputError: it is there, and must not be replaced; or there can be no such folder.
    """
    path = folder / RESULT
    if path.exists() and not overwrite:
        raise InputError(f"{path}: is there already; give --overwrite to replace it")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, text: str) -> None:
    """Write a file, so that it is there once it is whole."""
    partial_path = path.with_name(f".{path.name}.partial")
    with naming(path):
        partial_path.write_text(text, encoding="utf-8")
        os.replace(partial_path, path)


def _windows(source: Checkpoint, texts: Sequence[str], seqlen: int, limit: int | None, ranks: Ranks) -> list[Windows]:
    """The windows of all texts, which one rank reads."""
    if not texts:
        return []
    tokenizer = load_tokenizer(source.folder)
    seqlen = data.window_length(source.folder, seqlen, max_seqlen(read_config(source)))
    return ranks.on_first(
        lambda: [data.evaluation_windows(tokenizer, name, seqlen=seqlen, limit=limit) for name in dict.fromkeys(texts)]
    )
