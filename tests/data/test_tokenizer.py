"""A checkpoint's tokenizer: loaded as by transformers or refused in one line, and a long text's tokens those of all."""

import shutil

import pytest
from helpers.families import change_config
from helpers.texts import make_tokenizer, refused
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsefw.data import tokens
from sparsefw.data.tokens import load_tokenizer, tokenize, tokens_of
from sparsefw.default.text import evaluation_text
from sparsefw.inputs import DEFAULT_MODEL

# Loading


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEFAULT_MODEL, tmp_path / "model")


def test_damaged_tokenizer_is_refused_in_one_line(folder):
    change_config(folder, "tokenizer.json", pre_tokenizer="\x1b[31m")
    with refused(f"^{folder}: no tokenizer could be loaded: "):
        load_tokenizer(folder)


def test_no_code_of_a_checkpoint_is_run(folder):
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    change_config(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Tokenizer"]})
    load_tokenizer(folder)
    assert not (folder / "ran").exists()


# Tokens of long documents

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Prose, lists, code and tables; long numbers, scripts without spaces; lines that end in points and spaces.
TEXT = evaluation_text()[:9000] + "\n".join(f"{n**5}. {n}  \n\n\t日本語テキスト。 end.\n" for n in range(100, 160))


def bytes_after(split: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """BPE over bytes, as in GPT-2, or after another split of the text, as in Llama 3 and Qwen."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    return made


def unsplit() -> Tokenizer:
    """BPE over the whole text, with a space put before it, as in Llama 2 and Mistral."""
    made = Tokenizer(models.BPE(fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"]))
    made.pre_tokenizer = None
    return made


def unigram() -> Tokenizer:
    """The likeliest tokens, as in T5 and Gemma, with a space put before the text alone."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


KINDS = {
    "GPT-2": lambda: bytes_after(None),
    "Llama 3": lambda: bytes_after(pre_tokenizers.Split(Regex(LLAMA_3), "isolated")),
    "Llama 2": unsplit,
    "unigram": unigram,
}


@pytest.fixture
def small(monkeypatch):
    """Pieces of 1000 characters, in place of 65536."""
    for name, value in {"PIECE": 1000, "CONTEXT": 100, "SEARCHED": 300}.items():
        monkeypatch.setattr(tokens, name, value)


def all_tokens(of: PreTrainedTokenizerFast, strings: list[str]) -> list[int]:
    return [token for ids in tokens_of(of, [strings]) for token in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_pieces_are_those_of_the_whole_text(kind, small, monkeypatch):
    made = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    (expected,) = tokenize(made, [TEXT])
    assert len(list(tokens._pieces(made, [TEXT]))) > 10
    assert all_tokens(made, [TEXT]) == expected
    # However it is read.
    assert all_tokens(made, [TEXT[n : n + 77] for n in range(0, len(TEXT), 77)]) == expected
    # The places that are refused are places where tokens change.
    monkeypatch.setattr(tokens, "_find_cut", lambda *_: 900)
    assert all_tokens(made, [TEXT]) != expected


@pytest.mark.parametrize("text", ["", "a", " ", "a" * 1001, "a" * 5000, "\n" * 5000, "日本" * 2500, "a b\n\n" * 1200])
def test_nothing_is_lost(small, text):
    plain = make_tokenizer(bos=False)
    pieces = [piece for _, piece in tokens._pieces(plain, [text])]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1000 for piece in pieces)
    assert plain.decode(all_tokens(plain, [text])) == text
