"""Requests against the tokens that the harness's own model makes of the same texts."""

import pytest
from helpers.families import byte_tokenizer, save_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from sparsefw.data import load_tokenizer
from sparsefw.errors import InputError
from sparsefw.evaluation import Score
from sparsefw.evaluation.encoding import LOGLIKELIHOOD, ROLLING, Question, encoder, max_length_of, rolling
from sparsefw.evaluation.request import request_of
from sparsefw.inputs import DEFAULT_MODEL

START, END, MAX_LENGTH = 0, 1, 64

PAIRS = [
    ("a b", " c"),
    ("a b ", "c"),
    ("a\n \n", "b c"),
    # Nothing before it, and what begins with the start token by itself.
    ("", "c d"),
    ("", " c"),
    ("", "<s>c"),
    ("<s>a", " b"),
    ("<s>", "b"),
    ("the q", "uick brown fox"),
    ("ä€", "ö"),
    ("y" * 10, "x" * MAX_LENGTH),
    ("y" * 100, "x"),
    ("y" * 64, "x"),
    ("y" * 63, "xx"),
]
TEXTS = ["", "a", "<s>a b", "the quick brown fox", *("x" * n for n in (62, 63, 64, 65, 127, 128, 129, 200))]


class Recorded(HFLM):
    """The harness's model; keeps the tokens that it would be run on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens = []

    def _loglikelihood_tokens(self, requests, **_):
        self.tokens += [request[1:] for request in requests]
        return [(0.0, False)] * len(requests)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)
    return AutoModelForCausalLM.from_pretrained(folder)


def starting():
    """A tokenizer that puts a start token before a text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "start token", "pieces"])
def tokenizer_folder(request, tmp_path_factory):
    if request.param == "pieces":
        return DEFAULT_MODEL
    folder = tmp_path_factory.mktemp("tokenizer")
    (byte_tokenizer() if request.param == "bytes" else starting()).save_pretrained(folder)
    return folder


def tokens(requests):
    """The tokens of requests, read and predicted, as lists."""
    return [(list(request.read), list(request.targets)) for request in requests]


def instances(texts):
    return [Instance(LOGLIKELIHOOD, {}, pair, 0, metadata=("task", 0, 1)) for pair in texts]


def questions(kind, texts):
    return [Question(kind, text, f"task t, document {n}") for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    "options", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 5}], ids=str
)
def test_requests_are_those_of_the_harness(options, tokenizer_folder, model):
    theirs = Recorded(model, tokenizer=str(tokenizer_folder), **options)
    theirs.loglikelihood(instances(PAIRS), disable_tqdm=True)
    theirs.loglikelihood_rolling(instances([(text,) for text in TEXTS]), disable_tqdm=True)
    tokenizer = load_tokenizer(tokenizer_folder, options.get("add_bos_token"))
    mine = encoder(tokenizer, model.config, **options)
    encoded = mine.encode(questions(LOGLIKELIHOOD, PAIRS) + questions(ROLLING, [(text,) for text in TEXTS]))
    assert tokens(encoded.requests) == tokens(request_of(*pair, MAX_LENGTH) for pair in theirs.tokens)
    assert [len(part) for part in encoded.parts[: len(PAIRS)]] == [1] * len(PAIRS)
    for text in ("a b", "<s>a"):
        assert mine.tokens(text) == theirs.tok_encode(text)
        assert mine.tokens(text, special=False) == theirs.tok_encode(text, add_special_tokens=False)


@pytest.mark.parametrize("max_length", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 8, 13, 14, 15, 64, 65])
def test_windows_are_those_of_the_harness(count, max_length):
    text = list(range(100, 100 + count))
    windows = get_rolling_token_windows(text, START, max_length, context_len=1)
    expected = [request_of(*make_disjoint_window(window), max_length) for window in windows]
    assert tokens(rolling(text, START, max_length)) == tokens(expected)


def test_a_context_of_spaces_is_as_good_as_none(tokenizer_folder, model):
    """The harness's model ends in an assertion here, unless the tokenizer puts a start token before a text."""
    mine = encoder(load_tokenizer(tokenizer_folder), model.config)
    spaces, nothing = tokens(mine.encode(questions(LOGLIKELIHOOD, [("  ", "a"), ("", "  a")])).requests)
    assert spaces == nothing


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("a", "", "task t, document 0: '' adds no token"),
        ("", "", "task t, document 0: '' adds no token"),
        ("", "<s>", "task t, document 0: '<s>' adds no token"),
        ("a", "x" * 65, "task t, document 0: an answer of 65 tokens, and the model reads 64"),
    ],
)
def test_what_cannot_be_asked_is_refused(context, continuation, message, model):
    mine = encoder(byte_tokenizer(), model.config)
    with pytest.raises(InputError, match=message):
        mine.encode(questions(LOGLIKELIHOOD, [(context, continuation)]))


def test_a_tokenizer_without_start_and_end_is_refused(model):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither a start token nor an end token, .*; name bos_token or"):
        encoder(tokenizer, model.config)
    assert encoder(tokenizer, model.config, prefix_token_id=7).prefix == 7
    tokenizer.eos_token = "</s>"
    assert encoder(tokenizer, model.config).prefix == END


@pytest.mark.parametrize(
    ("config", "of_tokenizer", "expected"),
    [
        (AutoConfig.for_model("llama", max_position_embeddings=77), 5, 77),
        (AutoConfig.for_model("gpt2", n_positions=78), None, 78),
        (AutoConfig.for_model("gpt2"), None, 1024),
        (AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 79}), None, 79),
        (AutoConfig.for_model("mamba"), 80, 80),
        (AutoConfig.for_model("mamba"), int(1e30), 2048),
        (AutoConfig.for_model("mamba"), None, 2048),
    ],
)
def test_max_length(config, of_tokenizer, expected):
    assert max_length_of(config, of_tokenizer) == expected


def test_answers_put_scores_together(model):
    mine = encoder(byte_tokenizer(), model.config)
    asked = questions(LOGLIKELIHOOD, [("a", "b"), ("a", "c")]) + questions(ROLLING, [("x" * 130,), ("",)])
    encoded = mine.encode(asked)
    assert len(encoded.requests) == 5
    scores = [Score(-1.0, True), Score(-2.0, False), Score(-4.0, True), Score(-8.0, True), Score(-16.0, True)]
    assert encoded.answers(scores) == [(-1.0, True), (-2.0, False), -28.0, 0.0]
