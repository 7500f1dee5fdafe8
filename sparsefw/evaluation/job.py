"""Evaluate checkpoints on tasks and texts, each in one pass over its blocks."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsefw import checkpoint, process
from sparsefw.caller import on_cpu_by_default, settings_kept
from sparsefw.checkpoint import check_output, fingerprint, inspect
from sparsefw.checkpoint.source import Checkpoint
from sparsefw.errors import InputError
from sparsefw.estimate import memory_limits
from sparsefw.evaluation.answers import Budget, plan_of, scores_of
from sparsefw.evaluation.asked import Asked, Texts, ask
from sparsefw.evaluation.measured import Evaluation, task_records, text_record
from sparsefw.evaluation.request import Score
from sparsefw.evaluation.saved import KIND, RESULT, Saved, check_nothing_else
from sparsefw.flags import check_needs, checked_bool, checked_number, checked_path, set_field
from sparsefw.inputs import DEFAULT, DEFAULT_MODEL
from sparsefw.ranks import Ranks, joined_with
from sparsefw.report import machine

if TYPE_CHECKING:
    from sparsefw.evaluation.harness import Questions

# Draws for the standard errors that have no formula: for a thousand documents, some seconds.
DRAWS = 1000


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness.

    Attributes:
        names: names of tasks, groups and tags; "paper": those of the paper.
        limit: most documents of each; below 1: a share of them; None: all.
        num_fewshot: examples before each question; None: as the task says.
        include_path: a folder with more tasks in the harness's format.

    Raises:
        InputError: a number is none, or out of range, or the path cannot be one.
    """

    names: tuple[str, ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    include_path: str | Path | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            set_field(self, "limit", checked_number("limit", self.limit, 0, None))
        if self.num_fewshot is not None:
            set_field(self, "num_fewshot", checked_number("num_fewshot", self.num_fewshot, 0, 10**6, whole=True))
        if self.include_path is not None:
            # The identity of an evaluation holds it as JSON.
            set_field(self, "include_path", str(checked_path("include_path", self.include_path)))
        of_tasks = dict(limit=self.limit, num_fewshot=self.num_fewshot, include_path=self.include_path)
        check_needs("tasks", bool(self.names), **of_tasks)

    def questions(self) -> "Questions | None":
        """Their questions; None without tasks.

        Raises:
            InputError: the harness is not installed; or as `harness.questions`.
        """
        if not self.names:
            return None
        from sparsefw import evaluation

        return evaluation.questions(
            self.names, limit=self.limit, num_fewshot=self.num_fewshot, include_path=self.include_path
        )


@dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate`.

    Attributes:
        evaluation: what was measured, the content of evaluation.json.
        output: folder with that file; None if none was asked for.
    """

    evaluation: Evaluation
    output: Path | None


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
    restart: bool = False,
    plan: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> EvaluateResult | None:
    """Evaluate checkpoints, dense or pruned, of which one block is in memory at a time.

    After an interruption the same call goes on, if it has an output folder.

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
        output: folder for evaluation.json, and for what an interrupted evaluation has finished; None: nothing is
            written.
        overwrite: whether an older output may be replaced.
        restart: whether to discard what an interrupted evaluation has finished.
        plan: whether to say in the log what would be computed and what memory it takes, and no more.
        log: called with every line of the log.
        progress: whether to show a progress bar.

    Returns:
        What was measured; None for a plan.

    Raises:
        InputError: an argument is wrong; the message is one line that names it.
        TypeError: what must be a name or a path is neither.
    """
    first = () if against is None else _several("against", [against])
    job = _Job(
        names=list(dict.fromkeys(first + _several("models", models))),
        against=None if against is None else str(against),
        tasks=Tasks(_several("tasks", tasks), limit, num_fewshot, include_path),
        texts=Texts(_several("texts", texts), seqlen, eval_windows),
        budget=Budget(gpu_memory, host_memory),
        output=None if output is None else checked_path("output", output),
        overwrite=checked_bool("overwrite", overwrite),
        restart=checked_bool("restart", restart),
        plan=checked_bool("plan", plan),
    )
    with joined_with(log) as (ranks, say):
        evaluation = _evaluate(job, say, progress, ranks)
        return None if evaluation is None else EvaluateResult(evaluation, job.output)


@dataclass(frozen=True)
class _Job:
    """An evaluation that is asked for, see `evaluate`."""

    names: list[str]
    against: str | None
    tasks: Tasks
    texts: Texts
    budget: Budget
    output: Path | None
    overwrite: bool
    restart: bool
    plan: bool

    def __post_init__(self) -> None:
        if not self.tasks.names and not self.texts.names:
            raise InputError("--tasks, --eval: neither is given; give tasks, or a text for perplexity")
        check_needs("output", self.output is not None, overwrite=self.overwrite or None, restart=self.restart or None)


def _several(argument: str, given: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Names or paths, given as one or as many.

    Raises:
        TypeError: one is neither, such as a model in memory.
    """
    several = [given] if isinstance(given, str | Path) or not isinstance(given, Iterable) else [*given]
    for name in several:
        if not isinstance(name, str | Path):
            raise TypeError(f"{argument}: expected names or paths, got {type(name).__name__}")
    return tuple(map(str, several))


def _evaluate(job: _Job, say: Callable[[str], None], progress: bool, ranks: Ranks) -> Evaluation | None:
    folders = [ranks.local_first(partial(locate, name)) for name in job.names]
    _check_against(job, folders)
    if job.output:
        _check_output(job, job.output, folders)
    device = process.this_device()
    memory_limits(job.budget.gpu_memory, job.budget.host_memory, device, ranks)
    questions = ranks.local_first(job.tasks.questions)
    if questions:
        say(f"tasks: {', '.join(questions.tasks)}, {len(questions.asked)} questions")
    asked = [ask(folder, questions.asked if questions else [], job.texts) for folder in folders]
    _check_same_tokens(job, asked)
    if job.plan:
        for folder, of_model in zip(folders, asked, strict=True):
            plan_of(folder, of_model.requests, job.budget, say, ranks)
        return None
    identity = _identity(job, folders, asked, device, ranks)
    ranks.agree(identity)
    with _saved(job, identity | _times(job, folders), say, ranks) as saved:
        scores = [
            scores_of(
                folder, of_model.requests, job.budget, say=say, progress=progress, ranks=ranks, saved=saved, number=n
            )
            for n, (folder, of_model) in enumerate(zip(folders, asked, strict=True))
        ]
        evaluation = ranks.on_first(lambda: _measured(job, questions, asked, scores, say))
        if saved:
            saved.finish({RESULT: evaluation.to_json()})
    return evaluation


def locate(name: str) -> Path:
    """The folder of a checkpoint: "default" is the embedded model, and other names are as for `checkpoint.locate`."""
    return DEFAULT_MODEL if name == DEFAULT else checkpoint.locate(name)


def _check_against(job: _Job, folders: Sequence[Path]) -> None:
    """Refuse to compare a model with itself.

    Raises:
        InputError: no model is another one than that after --against.
    """
    if job.against is not None and len({folder.resolve() for folder in folders}) == 1:
        raise InputError(f"--against {job.against}: the model itself; compare it with another one, or leave it out")


def _check_output(job: _Job, output: Path, folders: Sequence[Path]) -> None:
    """Refuse an output folder that would harm something.

    Raises:
        InputError: as `check_output` and `check_nothing_else`.
    """
    given = [*job.texts.names, *([job.tasks.include_path] if job.tasks.include_path else [])]
    read = [Path(name) for name in given if os.path.lexists(name)]
    for folder in folders:
        check_output(output, folder, job.overwrite, read, KIND)
    check_nothing_else(output)


def _check_same_tokens(job: _Job, asked: Sequence[Asked]) -> None:
    """Refuse perplexities that cannot be compared.

    Raises:
        InputError: models have other tokenizers, or read fewer tokens at once.
    """
    for name, of_model in zip(job.names, asked, strict=True):
        for mine, first in zip(of_model.texts, asked[0].texts, strict=True):
            if (mine.hash, mine.seqlen) != (first.hash, first.seqlen):
                raise InputError(
                    f"{name}: reads {mine.source} as other tokens than {job.names[0]}, so that perplexities cannot be "
                    "compared; evaluate it by itself, or leave out --eval"
                )


def _identity(
    job: _Job, folders: Sequence[Path], asked: Sequence[Asked], device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """Values that must be the same on all ranks, and for an evaluation to go on with what another has finished."""
    identity: dict[str, Any] = {"--against": job.against, "the tasks": asdict(job.tasks), "--eval": [*job.texts.names]}
    # Answers are found by the number of their model.
    identity["the list of models"] = job.names
    for name, folder, of_model in zip(job.names, folders, asked, strict=True):
        source = inspect(folder)
        identity[f"model {name}"] = fingerprint(source)
        identity[f"the files of {name}"] = [(file.name, file.stat().st_size) for file in _files(source)]
        identity[f"what {name} is asked"] = of_model.digest
    return identity | {"the number of ranks": ranks.count} | machine(device)


def _times(job: _Job, folders: Sequence[Path]) -> dict[str, Any]:
    """As `_identity`: when the files of each model were changed. Each machine may have a copy of its own."""
    of_folders = ([file.stat().st_mtime_ns for file in _files(inspect(folder))] for folder in folders)
    return {f"the times of the files of {name}": times for name, times in zip(job.names, of_folders, strict=True)}


def _files(source: Checkpoint) -> list[Path]:
    """The files with weights."""
    return sorted({info.file for tensor, info in source.tensors.items() for info in info.stored(tensor).values()})


@contextmanager
def _saved(job: _Job, identity: dict[str, Any], say: Callable[[str], None], ranks: Ranks) -> Iterator[Saved | None]:
    output = job.output
    opened = Saved(output, identity, job.restart, say, ranks, job.overwrite) if output else nullcontext()
    with opened as saved:
        yield saved


def _measured(
    job: _Job,
    questions: "Questions | None",
    asked: Sequence[Asked],
    scores: Sequence[Sequence[Score]],
    say: Callable[[str], None],
) -> Evaluation:
    found = {}
    if questions:
        from sparsefw import evaluation

        found = {
            name: evaluation.results(questions, of_model.answers(of_scores), DRAWS)
            for name, of_model, of_scores in zip(job.names, asked, scores, strict=True)
        }
    likelihoods = [of_model.likelihoods(of_scores) for of_model, of_scores in zip(asked, scores, strict=True)]
    texts = [
        text_record(
            windows.source,
            windows.hash,
            windows.seqlen,
            {name: likelihoods[m][n] for m, name in enumerate(job.names)},
            job.against,
        )
        for n, windows in enumerate(asked[0].texts)
    ]
    records = task_records(found, job.against) if found else []
    for task in sorted({*(questions.tasks if questions else [])} - {record.task for record in records}):
        say(f"note: task {task}: none of its metrics is one that the harness computes for its kind of task")
    return Evaluation(job.names, job.against, records, texts)
