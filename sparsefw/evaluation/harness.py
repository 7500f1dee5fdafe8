"""Questions of lm-evaluation-harness, and its own results from the answers.

The harness builds all requests of all tasks before it asks the first one. `questions` lets it go so far and no
further. So a model is asked once, whatever the number of tasks; and `results` lets the harness go on with the answers.
Tasks, prompts, filters, metrics and their aggregation are the harness's own.
"""

import difflib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from lm_eval.api import metrics
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate, simple_evaluate
from lm_eval.tasks import TaskManager
from yaml import YAMLError

from sparsefw.data import failures
from sparsefw.errors import InputError, first_line, shown
from sparsefw.evaluation.encoding import LOGLIKELIHOOD, ROLLING, Answer, Question
from sparsefw.evaluation.randomness import Randomness, kept_randomness, randomness
from sparsefw.model.head import exp

# The tasks of the paper, by the harness's names. The paper says "seven EleutherAI zero-shot tasks" and no more. These
# are the seven of Wanda, whose masks it starts from, and of most papers on pruning since: Sun et al., "A Simple and
# Effective Pruning Approach for Large Language Models", section 4.1.
PAPER = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# The name that stands for them.
PAPER_NAME = "paper"

# Types of tasks that ask how likely texts are.
TYPES = {LOGLIKELIHOOD, ROLLING, "multiple_choice"}

# Loggers of libraries that say what they do.
LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "fsspec")

# The harness's switch against processes of its own.
IN_ONE_PROCESS = "DISABLE_MULTIPROC"

# Names in a message, at most.
NAMED = 5


@dataclass(frozen=True)
class Questions:
    """The questions of tasks.

    Attributes:
        asked: each question once, in the order of the tasks.
        tasks: names of the tasks, of those in groups, too.
        loaded: the tasks and groups of the harness.
        limit: most documents of a task.
        start: the random numbers after the tasks were loaded.
    """

    asked: list[Question]
    tasks: list[str]
    loaded: Any
    limit: int | float | None
    start: Randomness


def questions(
    names: Sequence[str],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    include_defaults: bool = True,
) -> Questions:
    """The questions of tasks.

    Args:
        names: names of tasks, groups and tags, patterns of these, paths of YAML files; "paper": those of `PAPER`.
        limit: most documents of a task; below 1: a share of them.
        num_fewshot: examples before each question; None: as the task says.
        include_path: a folder with tasks in the harness's format.
        include_defaults: whether the harness's own tasks are known.

    Raises:
        InputError: there is no such task, it generates text, its data cannot be loaded, or `limit` is no such number.
    """
    names = list(dict.fromkeys(name for given in names for name in (PAPER if given == PAPER_NAME else [given])))
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"{include_path}: no folder of tasks")
    _check_limit(limit)
    with _quiet(), kept_randomness():
        loader = _Loader(include_path=include_path, include_defaults=include_defaults)
        names = [found for name in names for found in loader.found(name)]
        try:
            simple_evaluate(
                _Stop(), tasks=list(names), num_fewshot=num_fewshot, limit=limit, task_manager=loader, bootstrap_iters=0
            )
        except _Built:
            pass
        except InputError:
            raise
        except _failures() as error:
            shots = f"; it may have fewer examples than --num-fewshot {num_fewshot}" if num_fewshot else ""
            raise InputError(f"{loader.building()}: no questions can be made of it: {_why(error)}{shots}") from error
    return Questions(_asked(loader.tasks), list(loader.tasks), loader.loaded, limit, loader.start)


def results(questions: Questions, answers: Sequence[Answer], bootstrap_iters: int = 100000) -> dict[str, Any]:
    """The harness's results: metrics with standard errors, versions, examples, and each document's answers and metrics.

    Args:
        questions: the questions of tasks.
        answers: the answers, in the order of `questions.asked`.
        bootstrap_iters: draws for the standard errors that have no formula; 0: no standard errors.

    Raises:
        InputError: the metrics of a task cannot be made of its documents and answers.
    """
    given = {question.key: answer for question, answer in zip(questions.asked, answers, strict=True)}

    def of(loaded: Any) -> dict[str, Any]:
        # As it was before the questions were made, so that the same are made again.
        questions.start.set()
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        return evaluate(
            _Answers(given), loaded, limit=questions.limit, bootstrap_iters=bootstrap_iters, fewshot_as_multiturn=True
        )

    with _quiet(), kept_randomness(), _one_process(), _infinity_for_overflow():
        try:
            return of(questions.loaded)
        except _failures() as error:
            raise _without_metrics(questions.loaded["tasks"], of, error) from error


def _without_metrics(tasks: Mapping[str, Any], of: Callable[[Any], object], error: Exception) -> InputError:
    """The error that names the task; `of` makes the results of some tasks."""
    for name, task in tasks.items():
        try:
            of({"tasks": {name: task}, "groups": {}})
        except _failures() as of_task:
            return InputError(f"task {name}: no metrics can be made of its answers: {_why(of_task)}")
    return InputError(f"tasks {', '.join(tasks)}: no metrics can be made of their answers: {_why(error)}")


def _check_limit(limit: int | float | None) -> None:
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise InputError(f"--limit {limit:g}: expected a number of documents, or a share of them between 0 and 1")


def _asked(tasks: Mapping[str, Any]) -> list[Question]:
    asked: dict[tuple, Question] = {}
    for name, task in tasks.items():
        for instance in task.instances:
            if instance.request_type not in (LOGLIKELIHOOD, ROLLING):
                raise InputError(_generates([name]))
            question = Question(instance.request_type, instance.args, f"task {name}, document {instance.doc_id}")
            asked.setdefault(question.key, question)
    return list(asked.values())


def _generates(names: Sequence[str]) -> str:
    """The line for tasks that generate text."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"task {', '.join(names[:NAMED])}{more}: generates text, and only likelihoods are computed here; leave "
        f"{'them' if len(names) > 1 else 'it'} out"
    )


class _Loader(TaskManager):
    """Loads tasks of the harness, and keeps them.

    Attributes:
        loaded: the tasks and groups.
        start: the random numbers after they were loaded.
    """

    loaded: Any = None
    start: Randomness

    @property
    def tasks(self) -> dict[str, Any]:
        """All tasks by name, with those of groups."""
        return self.loaded["tasks"]

    def found(self, name: str) -> list[str]:
        """The names that the user's name stands for.

        Raises:
            InputError: there is none, or it is a task that generates text.
        """
        if name in self.task_index or Path(name).is_file():
            return [name]
        if matches := self.match_tasks([name]):
            return matches
        close = difflib.get_close_matches(name, self.all_tasks, 3, 0.5)
        remedy = f"the closest names are {', '.join(close)}" if close else "`lm_eval ls tasks` lists all names"
        raise InputError(f"task {shown(name)!r}: unknown; {remedy}")

    def load(self, task_list: Any) -> Any:
        """As that of the harness.

        Raises:
            InputError: a task generates text, or cannot be loaded.
        """
        # These types are known before anything is downloaded.
        said = {name: self.task_index[name].cfg or {} for name in task_list if name in self.task_index}
        self._check_types({name: config.get("output_type") for name, config in said.items()})
        try:
            # All in one call: tasks may draw random numbers, and so does the harness when it asks for their names.
            self.loaded = super().load(task_list)
        except _failures() as error:
            raise self._of_one(task_list, error) from error
        self._check_types({name: task.OUTPUT_TYPE for name, task in self.tasks.items()})
        self.start = randomness()
        return self.loaded

    def building(self) -> str:
        """The task that the harness was making questions of."""
        tasks = self.tasks if self.loaded else {}
        # Those before it have requests.
        return next((f"task {name}" for name, task in tasks.items() if not getattr(task, "instances", None)), "tasks")

    def _of_one(self, names: Sequence[str], error: Exception) -> InputError:
        """The error that names the task."""
        for name in names:
            try:
                super().load([name])
            except _failures() as of_task:
                return InputError(f"task {shown(name)}: cannot be loaded: {_why(of_task)}")
        return InputError(f"tasks {', '.join(names)}: cannot be loaded together: {_why(error)}")

    @staticmethod
    def _check_types(types: Mapping[str, str | None]) -> None:
        if others := [name for name, kind in types.items() if kind is not None and kind not in TYPES]:
            raise InputError(_generates(others))


class _Built(Exception):
    """All questions have been made."""


class _Model(LM):
    """A model that only its own classes below make use of."""

    def generate_until(self, requests: list) -> NoReturn:
        raise InputError(_generates(sorted({request.task_name for request in requests})))


class _Stop(_Model):
    """Ends the harness's work with the first request."""

    def loglikelihood(self, requests: list) -> NoReturn:
        raise _Built

    loglikelihood_rolling = generate_until = loglikelihood


class _Answers(_Model):
    """Knows all answers."""

    def __init__(self, answers: Mapping[tuple[str, tuple[str, ...]], Answer]) -> None:
        super().__init__()
        self._answers = answers

    def loglikelihood(self, requests: list) -> list:
        return self._of(LOGLIKELIHOOD, requests)

    def loglikelihood_rolling(self, requests: list) -> list:
        return self._of(ROLLING, requests)

    def _of(self, kind: str, requests: Collection[Any]) -> list[Answer]:
        return [self._answers[kind, request.args] for request in requests]


def _failures() -> tuple[type[Exception], ...]:
    """Errors of a task's data, and of what its config has the harness do with a document."""
    return (
        *failures(),
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        StopIteration,
        TypeError,
        TemplateError,
        YAMLError,
    )


def _why(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return f"the Hub cannot be reached ({first_line(error)})"
    if isinstance(error, StopIteration):
        return "there is no document in it"
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        # Its own message says nothing.
        return first_line(error.__cause__)
    # A KeyError's message is the key.
    return f"{type(error).__name__}: {first_line(error)}" if isinstance(error, KeyError) else first_line(error)


@contextmanager
def _one_process() -> Iterator[None]:
    """Have the harness draw in this process, the same numbers: it forks, and torch's threads may hold locks then."""
    before = os.environ.get(IN_ONE_PROCESS)
    os.environ[IN_ONE_PROCESS] = "1"
    try:
        yield
    finally:
        del os.environ[IN_ONE_PROCESS]
        os.environ |= {} if before is None else {IN_ONE_PROCESS: before}


@contextmanager
def _infinity_for_overflow() -> Iterator[None]:
    """Have the harness compute an infinite perplexity of a model that is of no use; it raises OverflowError instead."""
    metrics.math = _Math()
    try:
        yield
    finally:
        metrics.math = math


class _Math:
    """The module `math`, where exp does not overflow."""

    def __getattr__(self, name: str) -> Any:
        return getattr(math, name)

    exp = staticmethod(exp)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the harness prints, logs and draws from the terminal; errors are exceptions."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
