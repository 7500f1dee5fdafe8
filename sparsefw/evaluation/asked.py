"""Make requests for a model of the questions of tasks and the windows of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsefw import data
from sparsefw.checkpoint import Checkpoint, inspect
from sparsefw.data import Tokenizer, Windows, load_tokenizer
from sparsefw.evaluation.encoding import Answer, Encoded, Question, encoder
from sparsefw.evaluation.request import Request, Score, digest_of
from sparsefw.flags import check_needs, checked_number, set_field
from sparsefw.model import read_config
from sparsefw.model.skeleton import max_seqlen

# Tokens in a window of a text, unless the user says.
SEQLEN = 2048


@dataclass(frozen=True)
class Texts:
    """Texts for perplexity.

    Attributes:
        names: their names or paths, as the user gave them.
        seqlen: tokens in a window, fewer if the model takes fewer; None: SEQLEN.
        windows: most windows of each; None: all.

    Raises:
        InputError: a number is none, out of range, or there without a text.
    """

    names: Sequence[str] = ()
    seqlen: int | None = None
    windows: int | None = None

    def __post_init__(self) -> None:
        if self.seqlen is not None:
            set_field(self, "seqlen", checked_number("seqlen", self.seqlen, 2, 10**9, whole=True))
        if self.windows is not None:
            set_field(self, "windows", checked_number("eval_windows", self.windows, 1, 10**9, whole=True))
        check_needs("evaluate", bool(self.names), seqlen=self.seqlen, eval_windows=self.windows)


@dataclass(frozen=True)
class Asked:
    """All that a model is asked.

    Attributes:
        requests: all requests: those of the questions, then those of the windows.
        encoded: the questions.
        texts: the windows of each text.
    """

    requests: list[Request]
    encoded: Encoded
    texts: list[Windows]

    @property
    def digest(self) -> str:
        """SHA-256 of all requests, in hex."""
        return digest_of(self.requests)

    def answers(self, scores: Sequence[Score]) -> list[Answer]:
        """The answers to the questions, from the scores of all requests."""
        return self.encoded.answers(scores[: len(self.encoded.requests)])

    def likelihoods(self, scores: Sequence[Score]) -> list[list[tuple[float, int]]]:
        """For each text and window, the log-likelihood of its tokens, and the number of them."""
        first, found = len(self.encoded.requests), []
        for windows in self.texts:
            of_text = scores[first : first + windows.n]
            found.append([(score.loglikelihood, windows.seqlen - 1) for score in of_text])
            first += windows.n
        return found


def ask(folder: Path, questions: Sequence[Question], texts: Texts, tokenizer: Tokenizer | None = None) -> Asked:
    """Make requests for a checkpoint.

    Args:
        folder: folder of the checkpoint.
        questions: the questions of tasks.
        texts: texts for perplexity.
        tokenizer: the model's tokenizer; None: the checkpoint's.

    Raises:
        InputError: there is no such checkpoint or tokenizer, or it cannot take a text.
    """
    source = inspect(folder)
    tokenizer = tokenizer or load_tokenizer(folder)
    encoded = encoder(tokenizer, read_config(source)).encode(questions) if questions else Encoded([], [], [])
    windows = [_windows(source, tokenizer, name, texts) for name in dict.fromkeys(texts.names)]
    return asked_of(encoded, windows)


def asked_of(encoded: Encoded, texts: list[Windows]) -> Asked:
    """Questions and windows together."""
    # The last token of a window is predicted, and need not be read.
    of_windows = [Request(ids[:-1], ids[1:]) for windows in texts for ids in windows.ids.tolist()]
    return Asked([*encoded.requests, *of_windows], encoded, texts)


def _windows(source: Checkpoint, tokenizer: Tokenizer, name: str, texts: Texts) -> Windows:
    seqlen = data.window_length(source.folder, texts.seqlen or SEQLEN, max_seqlen(read_config(source)))
    return data.evaluation_windows(tokenizer, name, seqlen=seqlen, limit=texts.windows)
