"""A streamed model for those who call lm-evaluation-harness themselves: `lm_eval.simple_evaluate(StreamedLM(...))`.

The harness asks for likelihoods of continuations first and of whole texts then. So the blocks are read twice if there
are tasks of both kinds, and once otherwise.
"""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerBase

from sparsefw import checkpoint, process
from sparsefw.caller import on_cpu_by_default, settings_kept
from sparsefw.data import load_tokenizer
from sparsefw.errors import InputError, shown
from sparsefw.evaluation.answers import Budget, scores_of
from sparsefw.evaluation.encoding import LOGLIKELIHOOD, ROLLING, Question, encoder
from sparsefw.evaluation.job import locate
from sparsefw.evaluation.request import Request, Score
from sparsefw.model import read_config
from sparsefw.ranks import joined

# The harness's command gives this device where the user gives none; its own models take it for whatever is there.
HARNESS_DEVICE = "cuda:0"

T = TypeVar("T", int, float)

# The name by which the harness knows the class.
NAME = "sparsefw"


class StreamedLM(TemplateLM):
    """A checkpoint of which one block is in memory at a time, as a model of lm-evaluation-harness.

    Started by torchrun, the processes share the work.

    Attributes:
        checkpoint: the checkpoint.
        config: its config, with the defaults of its class.
        tokenizer: the tokenizer, in this process.
    """

    @settings_kept()
    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        max_length: int | str | None = None,
        add_bos_token: bool | str | None = None,
        prefix_token_id: int | str | None = None,
        gpu_memory: float | str | None = None,
        host_memory: float | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | torch.device | None = None,
        **unknown: Any,
    ) -> None:
        """Open a checkpoint; no weights are read.

        Args:
            pretrained: folder or Hub id of a checkpoint in safetensors, or "default"; it must be given.
            tokenizer: folder of another checkpoint whose tokenizer is taken, its Hub id, or a tokenizer.
            max_length: most tokens that the model reads at once; None: as its config says.
            add_bos_token: whether texts get a start token; None: as the tokenizer's files say.
            prefix_token_id: token before a text that has nothing before it; None: the start token, or else the end
                token.
            gpu_memory, host_memory: memory limits in GiB; None: what is free, less a tenth.
            batch_size, max_batch_size: the harness gives them. Results do not depend on them, and batches are made by
                tokens, as many as fit.
            device: the device that is used, or None.
            unknown: refused.

        Raises:
            InputError: an argument is wrong; the message is one line that names it.
        """
        super().__init__()
        if unknown:
            known = [name for name in signature(StreamedLM).parameters if name != "unknown"]
            raise InputError(f"{shown(next(iter(unknown)))}: no argument of {NAME}; it takes {', '.join(known)}")
        if pretrained is None:
            raise InputError("pretrained: the checkpoint is left out; give its folder or Hub id")
        if not isinstance(pretrained, str | Path):
            raise InputError(f"pretrained: expected a folder or a Hub id, got {type(pretrained).__name__}")
        _check_batch_size("batch_size", batch_size)
        _check_batch_size("max_batch_size", max_batch_size)
        self._device = _checked_device(device)
        add_bos_token = _boolean("add_bos_token", add_bos_token)
        self.checkpoint = checkpoint.inspect(locate(str(pretrained)))
        self.config = read_config(self.checkpoint)
        self.config.name_or_path = str(pretrained)
        self.tokenizer = self._tokenizer(tokenizer, add_bos_token)
        self._budget = Budget(
            _number("gpu_memory", gpu_memory, float, 0), _number("host_memory", host_memory, float, 0)
        )
        self._encoder = encoder(
            self.tokenizer,
            self.config,
            _number("max_length", max_length, int, 1),
            add_bos_token,
            _number("prefix_token_id", prefix_token_id, int, 0),
        )

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self._encoder.max_length

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        return self._encoder.prefix

    @property
    def eot_token_id(self) -> int | None:
        """The end token."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, by which the harness keeps prompts."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """The entries on the model in the harness's results."""
        numbers = sum(torch.Size(tensor.shape).numel() for tensor in self.checkpoint.tensors.values())
        return {"model_num_parameters": numbers, "model_dtype": str(self.checkpoint.dtype)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text."""
        return self._encoder.tokens(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a text.

        Raises:
            InputError: the tokenizer has no chat template, or it does not take this conversation.
        """
        render: Any = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            try:
                return render(chat_history)
            except TemplateError:
                # Many templates know no such role. The harness's own model goes on without it, too.
                return render([message for message in chat_history if message["role"] != "system"])
        except (TemplateError, ValueError) as error:
            raise InputError(f"{self.tokenizer.name_or_path}: no chat template that fits: {error}") from error

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely continuations are, and whether each of their tokens is the most likely one."""
        return self._answers(LOGLIKELIHOOD, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """How likely whole texts are."""
        return self._answers(ROLLING, requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> NoReturn:
        """Refuse to generate text.

        Raises:
            InputError: always; the message names the tasks.
        """
        names = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise InputError(f"task {names}: generates text, and {NAME} only computes likelihoods; leave it out")

    def _answers(self, kind: str, instances: Sequence[Any], disable_tqdm: bool) -> list[Any]:
        places = {instance.args: f"task {instance.task_name}, document {instance.doc_id}" for instance in instances}
        asked = [Question(kind, texts, place) for texts, place in places.items()]
        encoded = self._encoder.encode(asked)
        answers = dict(zip(places, encoded.answers(self._scores(encoded.requests, disable_tqdm)), strict=True))
        for texts, answer in answers.items():
            self.cache_hook.add_partial(kind, texts, answer)
        return [answers[instance.args] for instance in instances]

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        made = [
            self._encoder.request(context, continuation, "a request", str(texts))
            for texts, context, continuation in requests
        ]
        return [(score.loglikelihood, score.greedy) for score in self._scores(made, disable_tqdm)]

    @settings_kept()
    @on_cpu_by_default()
    def _scores(self, requests: Sequence[Request], disable_tqdm: bool) -> list[Score]:
        with joined() as ranks:
            folder, progress = self.checkpoint.folder, not disable_tqdm and ranks.first
            return scores_of(folder, requests, self._budget, progress=progress, ranks=ranks)

    def _tokenizer(
        self, given: str | Path | PreTrainedTokenizerBase | None, add_bos_token: bool | None
    ) -> PreTrainedTokenizerBase:
        if isinstance(given, PreTrainedTokenizerBase):
            return given
        if given is None:
            return load_tokenizer(self.checkpoint.folder, add_bos_token)
        if not isinstance(given, str | Path):
            raise InputError(f"tokenizer: expected a folder, a Hub id or a tokenizer, got {type(given).__name__}")
        folder = locate(str(given))
        checkpoint.inspect_tokenizer(folder)
        return load_tokenizer(folder, add_bos_token)


def _number(name: str, value: float | str | None, kind: type[T], least: int) -> T | None:
    """A number given as it is or as text, as on the harness's command line."""
    if value is None:
        return None
    try:
        # int() would cut a fraction off.
        number = kind(str(value))
    except ValueError:
        number = None
    if number is None or not number >= least:
        raise InputError(f"{name} {shown(value)}: expected a number, at least {least}")
    return number


def _boolean(name: str, value: bool | str | None) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    # The harness's command makes numbers of some texts.
    text = str(value).lower()
    if text not in ("true", "false"):
        raise InputError(f"{name} {shown(value)}: expected true or false")
    return text == "true"


def _check_batch_size(name: str, value: int | str | None) -> None:
    if value is not None and str(value).partition(":")[0] != "auto":
        _number(name, value, int, 1)


def _checked_device(device: str | torch.device | None) -> torch.device:
    """The device that is used.

    Raises:
        InputError: another one is asked for.
    """
    used = process.this_device()
    if device not in (None, "auto", HARNESS_DEVICE, used.type, str(used), used):
        raise InputError(
            f"device {shown(device)}: {used} is used here; leave it out (CUDA_VISIBLE_DEVICES chooses the GPU)"
        )
    return used
