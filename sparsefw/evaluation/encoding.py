"""The texts of lm-evaluation-harness as tokens: cut, joined and shortened exactly as its own model `hf` does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from sparsefw.data import Tokenizer, tokenize
from sparsefw.errors import InputError, shown
from sparsefw.evaluation.request import Request, Score, request_of

# The first asks for a continuation behind a context, the second for a text as a whole.
LOGLIKELIHOOD, ROLLING = "loglikelihood", "loglikelihood_rolling"

# Entries of a config that say how many tokens the model reads at once; where there is none, and none of the tokenizer.
LENGTHS, DEFAULT_LENGTH = ("n_positions", "max_position_embeddings", "n_ctx"), 2048
# The tokenizer's maximum where it has none: int(1e30).
NO_LENGTH = 10**18

# Questions that are tokenized at once.
CHUNK = 2048

# How likely a continuation is, and whether each of its tokens is the most likely one; of a whole text, the first alone.
Answer = tuple[float, bool] | float


@dataclass(frozen=True)
class Question:
    """A question of the harness.

    Attributes:
        kind: LOGLIKELIHOOD or ROLLING.
        texts: context and continuation, or a whole text.
        place: the task and the document that ask it first, for messages.
    """

    kind: str
    texts: tuple[str, ...]
    place: str

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """The same for questions with the same answer."""
        return self.kind, self.texts


class Encoded(NamedTuple):
    """Questions as requests.

    Attributes:
        requests: all requests.
        parts: by question, its requests in order; one for a continuation, any number for a whole text.
    """

    questions: Sequence[Question]
    requests: list[Request]
    parts: list[range]

    def answers(self, scores: Sequence[Score]) -> list[Answer]:
        """The answers to the questions, from the scores of the requests."""
        answers: list[Answer] = []
        for question, part in zip(self.questions, self.parts, strict=True):
            loglikelihood = sum((scores[n].loglikelihood for n in part), 0.0)
            answers.append(loglikelihood if question.kind == ROLLING else (loglikelihood, scores[part[0]].greedy))
        return answers


@dataclass(frozen=True)
class Encoder:
    """Makes requests of questions.

    Attributes:
        tokenizer: the tokenizer; one in this process was loaded with the same `add_bos_token`.
        max_length: most tokens that the model reads at once.
        prefix: the token before a text that has nothing before it.
        prefix_text: its text. A text that begins with it is given no special tokens.
        special: whether the tokenizer puts its special tokens around texts.
    """

    tokenizer: Tokenizer
    max_length: int
    prefix: int
    prefix_text: str
    special: bool = True

    def encode(self, questions: Sequence[Question]) -> Encoded:
        """Make requests of questions.

        Raises:
            InputError: a continuation has no tokens or too many, or the tokenizer cannot take a text.
        """
        requests: list[Request] = []
        parts = []
        for first in range(0, len(questions), CHUNK):
            chunk = questions[first : first + CHUNK]
            tokens = self._tokens({text for question in chunk for text in self._texts(question)})
            for question in chunk:
                made = self._requests(question, tokens)
                parts.append(range(len(requests), len(requests) + len(made)))
                requests += made
        return Encoded(questions, requests, parts)

    def tokens(self, text: str, special: bool | None = None) -> list[int]:
        """The tokens of a text; `special` as the harness's `add_special_tokens`."""
        key = text, self._special(text) if special is None else special
        return self._tokens({key})[key]

    def request(self, context: list[int], continuation: list[int], place: str, text: str) -> Request:
        """The request for a continuation; `text` is that of the continuation.

        Raises:
            InputError: it has no tokens, or too many.
        """
        if not continuation:
            raise InputError(
                f"{place}: {shown(text)!r} adds no token to what is before it, so nothing can be predicted; leave the "
                "document out"
            )
        if len(continuation) > self.max_length:
            raise InputError(
                f"{place}: an answer of {len(continuation)} tokens, and the model reads {self.max_length} at once; "
                "leave the document out"
            )
        return request_of(context, continuation, self.max_length)

    def _special(self, text: str) -> bool:
        return self.special and not text.startswith(self.prefix_text)

    def _texts(self, question: Question) -> Iterator[tuple[str, bool]]:
        """The texts to tokenize, each with whether it is given special tokens."""
        if question.kind == ROLLING:
            (text,) = question.texts
            yield text, self._special(text)
            return
        context, continuation = _split(*question.texts)
        whole = context + continuation
        # Only a context has a beginning that special tokens belong to.
        yield (whole, self._special(whole)) if question.texts[0] else (whole, False)
        if context:
            yield context, self._special(context)

    def _tokens(self, texts: set[tuple[str, bool]]) -> dict[tuple[str, bool], list[int]]:
        found: dict[tuple[str, bool], list[int]] = {}
        for special in (False, True):
            if chosen := sorted(key for key in texts if key[1] is special):
                found |= zip(chosen, tokenize(self.tokenizer, [text for text, _ in chosen], special), strict=True)
        return found

    def _requests(self, question: Question, tokens: dict[tuple[str, bool], list[int]]) -> list[Request]:
        whole, *contexts = (tokens[key] for key in self._texts(question))
        if question.kind == ROLLING:
            return list(rolling(whole, self.prefix, self.max_length))
        # The context's own tokens count, also where its last one is another in the whole.
        context = contexts[0] if contexts else []
        continuation = whole[len(context) :]
        if not context:
            context, continuation = [self.prefix], continuation[continuation[:1] == [self.prefix] :]
        return [self.request(context, continuation, question.place, question.texts[1])]


def encoder(
    tokenizer: Tokenizer,
    config: PretrainedConfig,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    prefix_token_id: int | None = None,
) -> Encoder:
    """The encoder for a model.

    Args:
        tokenizer: the model's tokenizer, loaded with the same `add_bos_token`.
        config: the model's config.
        max_length: most tokens that the model reads at once; None: as config and tokenizer say.
        add_bos_token: whether texts get special tokens; None: as the tokenizer does by itself.
        prefix_token_id: the token before a text that has nothing before it; None: the start token, or else the end
            token.

    Raises:
        InputError: there is no such token.
    """
    tokens = (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    prefix = next((token for token in tokens if token is not None), None)
    if prefix is None:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has neither a start token nor an end token, behind which the "
            "first token of a text is predicted; name bos_token or eos_token in tokenizer_config.json, or give "
            "StreamedLM prefix_token_id"
        )
    if not 0 <= prefix < len(tokenizer):
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no token {prefix}: there are {len(tokenizer)}")
    length = max_length or max_length_of(config, tokenizer.model_max_length)
    return Encoder(tokenizer, length, prefix, str(tokenizer.decode(prefix)), add_bos_token is not False)


def max_length_of(config: PretrainedConfig, of_tokenizer: int | None) -> int:
    """Most tokens that a model reads at once."""
    text = getattr(config, "text_config", None) or config
    for name in LENGTHS:
        if (value := getattr(text, name, None)) is not None:
            return int(value)
    return of_tokenizer if of_tokenizer and of_tokenizer < NO_LENGTH else DEFAULT_LENGTH


def rolling(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[Request]:
    """Requests that predict each token of a text once, in windows of `max_length` tokens.

    The first window begins with the prefix. The last one begins earlier, so that it has as many tokens as the others.
    """
    text = (prefix, *tokens)
    for first in range(0, len(tokens), max_length):
        end = min(first + max_length, len(tokens))
        yield Request(text[max(0, end - max_length) : end], text[first + 1 : end + 1])


def _split(context: str, continuation: str) -> tuple[str, str]:
    """Context and continuation, with spaces at the end of the context moved over: tokens begin with a space."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
