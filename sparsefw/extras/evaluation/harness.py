"""Run tasks of lm-evaluation-harness on a model with one block in memory at a time.

The harness sends the requests of all tasks in two calls: all continuations, then all whole texts. So every block is
read once for each call. Tasks, prompts, filters, metrics and aggregations are the harness's own.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import get_aggregation
from lm_eval.models.utils import resolve_max_length
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sparsefw.caller import on_cpu_by_default, settings_kept
from sparsefw.checkpoint.source import inspect
from sparsefw.data.tokens import load_tokenizer, tokenize
from sparsefw.errors import InputError, Say, errors_in_one_line, first_line, option, shown
from sparsefw.extras.evaluation.batching import Request, request_of
from sparsefw.extras.evaluation.metrics import DERIVATIVES
from sparsefw.extras.evaluation.streaming import Score, scores_of
from sparsefw.fields import checked_number
from sparsefw.inputs import locate
from sparsefw.model.skeleton import read_config
from sparsefw.ranks import joined_with

# The tasks of the paper, by the harness's names. The paper only says "seven EleutherAI zero-shot tasks". These are the
# seven of Wanda, whose masks the paper starts from: Sun et al., "A Simple and Effective Pruning Approach for Large
# Language Models", section 4.1. Most later papers on pruning use them.
PAPER = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

# The harness's types of tasks that need likelihoods only.
TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


class StreamedLM(TemplateLM):
    """A checkpoint as a model of lm-evaluation-harness. With torchrun, the processes share the requests.

    Args:
        pretrained: folder or Hub id of a checkpoint in safetensors, or "default".
        max_length: most tokens in a request; None: the model's maximum in its config.
        add_bos_token: whether texts get a start token; None: as the tokenizer's files say.
        prefix_token_id: token before a text without a context; None: the start token, or the end token if there is no
            start token.
        gpu_memory, host_memory: memory limits in GiB; None: the free memory less a tenth.
        batch_size, max_batch_size, device: ignored; the harness passes them. Memory limits decide the batch size.
        log: called with every line of the log.
        progress: whether to show a progress bar; None: only in a terminal.

    Attributes:
        checkpoint: the checkpoint.
        tokenizer: its tokenizer.
        failure: the exception that ended `scores`; None: there was none.

    Raises:
        InputError: an argument is unknown or no such value, there is no such checkpoint, or its tokenizer cannot be
            used.
    """

    @settings_kept()
    def __init__(
        self,
        pretrained: str | Path = "",
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        gpu_memory: float | None = None,
        host_memory: float | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | torch.device | None = None,
        log: Say = lambda line: None,
        progress: bool | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise InputError(f"{name}: no argument of the model; give pretrained, max_length or a memory limit")
        if not pretrained:
            raise InputError("pretrained: no model is named; give one")
        limits = {"gpu_memory": gpu_memory, "host_memory": host_memory}
        for name, value in (limits | {"max_length": max_length, "prefix_token_id": prefix_token_id}).items():
            if value is not None:
                checked_number(name, value, 0, None, whole=name not in limits)
        self.checkpoint = inspect(locate(str(pretrained)))
        self.tokenizer = load_tokenizer(self.checkpoint.folder, add_bos_token)
        self.max_length = max_length or resolve_max_length(read_config(self.checkpoint), self.tokenizer)
        self._special = add_bos_token is not False
        tokens = (prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self._prefix = next((token for token in tokens if token is not None), None)
        self._limits, self._log = limits, log
        self._progress = progress
        self.failure: BaseException | None = None

    @property
    def eot_token_id(self) -> int | None:
        """The end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context.

        Raises:
            InputError: the tokenizer has no such token.
        """
        if self._prefix is None:
            raise InputError(
                f"{self.checkpoint.folder}: the tokenizer has neither a start token nor an end token, and one has to "
                "come before a text; name bos_token or eos_token in tokenizer_config.json"
            )
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, under which the harness caches prompts."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize a text. A text that begins with the prefix token's text gets no special tokens."""
        if add_special_tokens is None:
            prefix = str(self.tokenizer.decode(self._prefix)) if self._prefix is not None else ""
            add_special_tokens = self._special and not (prefix and string.startswith(prefix))
        return tokenize(self.tokenizer, [string], add_special_tokens)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as one text."""
        with errors_in_one_line(f"{self.checkpoint.folder}: the chat template fails"):
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-likelihoods of whole texts, cut into windows so that each token is predicted once."""
        length, of_texts = self.max_length, list[list[Request]]()
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(*request.args), self.prefix_token_id, length, 1)
            of_texts.append(
                [request_of(before, tokens, length) for before, tokens in map(make_disjoint_window, windows)]
            )
        scores = iter(self.scores([window for of_text in of_texts for window in of_text], disable_tqdm))
        return [sum(next(scores).loglikelihood for _ in of_text) for of_text in of_texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> NoReturn:
        """Refuse tasks that generate text.

        Raises:
            InputError: always; the message names the tasks.
        """
        raise generation_error(sorted({str(request.task_name) for request in requests}))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        for (_, answer), _before, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"an answer of {len(continuation)} tokens, {shown(answer)!r}: the model predicts from 1 to "
                    f"{self.max_length} tokens; leave the document out"
                )
        made = [
            request_of(context or [self.prefix_token_id], continuation, self.max_length)
            for _, context, continuation in requests
        ]
        return [*self.scores(made, disable_tqdm)]

    @settings_kept()
    @on_cpu_by_default()
    def scores(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[Score]:
        """Compute the scores of requests in one pass through the blocks.

        Raises:
            InputError: as for `scores_of`.
        """
        shown = False if disable_tqdm else self._progress
        try:
            with joined_with(self._log) as (ranks, say):
                return scores_of(self.checkpoint, requests, **self._limits, say=say, progress=shown, ranks=ranks)
        except Exception as error:
            self.failure = error
            raise


class Tasks(TaskManager):
    """Tasks of the harness that need likelihoods only.

    Args:
        names: names of tasks, groups and tags, patterns of such names, or paths of YAML files; "paper" stands for
            the tasks in PAPER.
        include_path: a folder with more tasks; None: no such folder.
        include_defaults: whether to include the harness's own tasks.

    Attributes:
        names: the harness's names of the tasks, groups and tags.

    Raises:
        InputError: there is no such folder or task.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None, include_defaults: bool = True) -> None:
        if include_path is not None and not include_path.is_dir():
            raise InputError(f"{include_path}: no such folder; give a folder of tasks")
        # Without this, the harness logs every step.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(include_path=include_path and str(include_path), include_defaults=include_defaults)
        self.names: list[str] = []
        for name in names:
            for task in PAPER if name == "paper" else [name]:
                found = [task] if Path(task).is_file() else self.match_tasks([task])
                if not found:
                    raise InputError(f"task {shown(task)!r}: unknown; `lm_eval ls tasks` lists all names")
                self.names += [x for x in found if x not in self.names]

    def load(self, task_list: Any) -> Any:
        """Load tasks, as the harness does.

        Raises:
            InputError: a task generates text.
        """
        loaded = super().load(task_list)
        self._loaded = loaded["tasks"]
        if others := [name for name, task in self._loaded.items() if task.OUTPUT_TYPE not in TYPES]:
            raise generation_error(others)
        return loaded

    def results(self, model: StreamedLM, limit: float | None, num_fewshot: int | None) -> Mapping[str, Any]:
        """Return the harness's results for a model, with the values of each document; empty on all ranks but the first.

        The added entry "aggregations" names the aggregation of these values, by task and metric.

        Raises:
            InputError: the harness cannot load the tasks, make their prompts or compute their metrics; or as for
                `StreamedLM`.
        """
        model.failure = None
        try:
            # No bootstrap: `metrics` computes standard errors from the values of the documents.
            found = simple_evaluate(
                model, tasks=[*self.names], num_fewshot=num_fewshot, limit=limit, task_manager=self, bootstrap_iters=0
            )
        # The code of a task may raise anything. An error of the model, which the harness calls, is raised unchanged.
        except Exception as error:
            if isinstance(error, InputError | MemoryError) or error is model.failure:
                raise
            line = f"{type(error).__name__}: {first_line(error)}"
            tasks = option("tasks", ",".join(self.names))
            raise InputError(f"{tasks}: the harness cannot evaluate them: {line}") from error
        names = {get_aggregation(name): name for name in DERIVATIVES}
        aggregations = {
            task: {metric: names.get(function) for metric, function in loaded.aggregation().items()}
            for task, loaded in self._loaded.items()
        }
        return {**found, "aggregations": aggregations} if found else {}


def generation_error(names: Sequence[str]) -> InputError:
    """Make the error for tasks that generate text."""
    return InputError(f"task {', '.join(names)}: generates text, and only likelihoods are computed here; leave it out")
