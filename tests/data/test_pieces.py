"""Pieces: a long text has the tokens that it has in one piece, and no more of it is read or tokenized at once."""

import itertools

import pytest
from helpers.texts import make_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsefw.data import pieces
from sparsefw.data.pieces import cut, tokenized
from sparsefw.data.tokenizer import tokenize
from sparsefw.default.text import evaluation_text

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Prose, lists, code and tables; long numbers, scripts without spaces; lines that end in points and spaces.
TEXT = evaluation_text()[:9000] + "\n".join(f"{n**5}. {n}  \n\n\t日本語テキスト。 end.\n" for n in range(100, 160))


def trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def bytes_after(split: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """BPE over bytes, as in GPT-2, or after another split of the text, as in Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))


def unsplit() -> Tokenizer:
    """BPE over the whole text, with a space put before it, as in Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False))
    tokenizer.pre_tokenizer = None
    return tokenizer


def unigram() -> Tokenizer:
    """The likeliest tokens, as in T5 and Gemma, with a space put before the text alone."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.pre_tokenizer, whole = pre_tokenizers.Metaspace(), tokenizer.pre_tokenizer
    trained(tokenizer, trainer)
    tokenizer.pre_tokenizer = whole
    return tokenizer


def word_pieces() -> Tokenizer:
    """Pieces of words, without spaces and capitals, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False))


KINDS = {
    "GPT-2": lambda: bytes_after(None),
    "Llama 3": lambda: bytes_after(pre_tokenizers.Split(Regex(LLAMA_3), "isolated")),
    "Llama 2": unsplit,
    "unigram": unigram,
    "words": word_pieces,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param]())


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


@pytest.fixture
def small(monkeypatch):
    """Pieces of 1000 characters, in place of 65536."""
    for name, value in {"PIECE": 1000, "CONTEXT": 100, "SEARCHED": 300}.items():
        monkeypatch.setattr(pieces, name, value)


def tokens_of(tokenizer: PreTrainedTokenizerFast, strings: list[str]) -> list[int]:
    return [token for _, ids in tokenized(tokenizer, cut(tokenizer, strings)) for token in ids]


def test_tokens_are_those_of_the_whole_text(tokenizer, small):
    assert len(list(cut(tokenizer, [TEXT]))) > 10
    assert tokens_of(tokenizer, [TEXT]) == tokenize(tokenizer, [TEXT])[0]


def test_tokens_do_not_depend_on_how_a_text_is_read(tokenizer, small):
    strings = [TEXT[n : n + 77] for n in range(0, len(TEXT), 77)]
    assert list(cut(tokenizer, strings)) == list(cut(tokenizer, [TEXT]))


def test_a_cut_at_every_paragraph_would_change_tokens(tokenizer, small, monkeypatch):
    """The places that are refused are places where tokens change."""
    monkeypatch.setattr(pieces, "_ends_a_token", lambda *_: True)
    monkeypatch.setattr(pieces, "_places", lambda text, end: iter([end]))
    assert tokens_of(tokenizer, [TEXT]) != tokenize(tokenizer, [TEXT])[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " ",
        "a" * 1000,
        "a" * 1001,
        "a" * 5000,
        " " * 5000,
        "\n" * 5000,
        "日本" * 2500,
        "a b\n\n" * 1200,
        "\r\n" * 900,
    ],
    ids=lambda text: f"{text[:3]!r} {len(text)}",
)
def test_nothing_is_lost(plain, small, text):
    found = list(cut(plain, [text]))
    assert "".join(piece.text for piece in found) == text
    assert all(len(piece.text) <= 1000 for piece in found)
    assert len(found) == 1 or len(text) > 1000
    assert plain.decode(tokens_of(plain, [text])) == text


def test_a_text_without_a_good_cut_keeps_its_characters(small):
    # One word, of which any two pieces merge.
    merges = [("a" * n, "a" * n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    vocabulary = {"a" * 2**n: n for n in range(10)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.decoder = decoders.Fuse()
    greedy = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a" * 4321
    assert tokens_of(greedy, [text]) != tokenize(greedy, [text])[0]
    assert "".join(greedy.convert_ids_to_tokens(tokens_of(greedy, [text]))) == text


def test_no_more_is_read_or_tokenized_than_a_piece(plain, small, monkeypatch):
    read, sizes = [], []

    def endless():
        for n in itertools.count():
            read.append(n)
            yield "some words " * 10

    def watched(tokenizer, texts):
        sizes.append(sum(map(len, texts)))
        return tokenize(tokenizer, texts)

    monkeypatch.setattr(pieces, "tokenize", watched)
    for found, _ in itertools.islice(tokenized(plain, cut(plain, endless())), 5):
        assert found.text
    assert sum(sizes) > 4000
    assert max(sizes) <= 1000 + 100
    assert len(read) < 7 * 1000 / 110


def test_short_documents_are_tokenized_together(plain, small, monkeypatch):
    sizes = []
    monkeypatch.setattr(pieces, "tokenize", lambda _, texts: sizes.append([*map(len, texts)]) or [[1]] * len(texts))
    documents = [pieces.Piece("", "x" * n) for n in (400, 500, 300, 1000, 1, *[1] * 64)]
    assert [piece for piece, _ in tokenized(plain, documents)] == documents
    assert sizes == [[400, 500], [300], [1000], [1] * 64, [1]]
