"""Tokenizers of several families give the tokens that transformers gives with nothing left out of their files."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    BartTokenizer,
    BertTokenizer,
    CodeGenTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

from sparsefw.data.tokenizer import TokenizerProcess, load_tokenizer, start_tokens, tokenize

TEXTS = ["low lower lowest", " The  l\u00f6w\n\nÉtude <tool> low", "", "ab<mask>c</s>d"]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<mask>", "<|endoftext|>", "<bos>", "<eos>", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = [*"abcdehlnorstuwT", "É", "ö", "\u0120", "\u2581", "\u00c3", "\u00b6", "\u2030", "\u010a"]
MERGES = [("l", "o"), ("lo", "w"), ("e", "r"), ("low", "er"), ("\u0120", "low"), ("\u2581", "low"), ("s", "t")]
VOCABULARY = {t: n for n, t in enumerate([*SPECIAL, *LETTERS, *("".join(pair) for pair in MERGES)])}
PIECES = [(token, -float(n)) for token, n in VOCABULARY.items()]

# By type of model: a class, what it is made of, and what its config says more.
FAMILIES = {
    "gpt2": (GPT2Tokenizer, {"vocab": VOCABULARY, "merges": MERGES}, {"add_bos_token": True, "errors": "replace"}),
    "qwen2": (Qwen2Tokenizer, {"vocab": VOCABULARY, "merges": MERGES}, {"add_prefix_space": False}),
    "llama": (LlamaTokenizer, {"vocab": VOCABULARY, "merges": MERGES}, {"add_bos_token": True, "legacy": False}),
    "gemma": (GemmaTokenizer, {"vocab": VOCABULARY, "merges": MERGES}, {"add_bos_token": True}),
    "roberta": (RobertaTokenizer, {"vocab": VOCABULARY, "merges": MERGES}, {"trim_offsets": True}),
    "bart": (BartTokenizer, {"vocab": VOCABULARY, "merges": MERGES}, {"add_prefix_space": True}),
    "codegen": (CodeGenTokenizer, {"vocab": VOCABULARY, "merges": MERGES}, {"return_token_type_ids": False}),
    "bert": (BertTokenizer, {"vocab": VOCABULARY}, {"do_lower_case": True, "strip_accents": True}),
    "t5": (T5Tokenizer, {"vocab": PIECES}, {"extra_ids": 3}),
}
# As real configs have them: paths of another machine, what is only for people, templates, special tokens of many kinds.
REAL = {
    "tokenizer_file": "/root/.cache/huggingface/tokenizer.json",
    "special_tokens_map_file": "/admin/.cache/special_tokens_map.json",
    "name_or_path": "org/name",
    "vocab_file": None,
    "sp_model_kwargs": {},
    "use_fast": True,
    "model_max_length": 7,
    "clean_up_tokenization_spaces": True,
    "chat_template": "{% for m in messages %}{{ m }}{% endfor %}",
    "additional_special_tokens": ["<tool>"],
    "image_token": "<image>",
    "padding_side": "left",
}


def make(folder: Path, kind: str, *, whole: bool) -> Path:
    """A folder with a tokenizer; not `whole`: without tokenizer.json."""
    made, parts, more = FAMILIES[kind]
    tokenizer = made(**parts)
    tokenizer.add_tokens([AddedToken("low lo", normalized=True), AddedToken("<extra>", special=True)])
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | REAL | more))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if not whole:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n")
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(TEXTS, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "whole"), [*((kind, True) for kind in FAMILIES), *((kind, False) for kind in ("gpt2", "qwen2", "bert"))]
)
def test_same_tokens_as_of_transformers(kind, whole, tmp_path):
    folder = make(tmp_path, kind, whole=whole)
    plain = AutoTokenizer.from_pretrained(folder)
    assert len({token for ids in tokens(plain) for token in ids}) > 2
    with TokenizerProcess(folder) as apart:
        assert tokenize(apart, TEXTS) == tokens(plain)
        assert start_tokens(apart) == start_tokens(plain)
    here = load_tokenizer(folder)
    assert type(here) is type(plain)
    for special in (True, False):
        assert here(TEXTS, add_special_tokens=special) == plain(TEXTS, add_special_tokens=special)
    assert here.chat_template == plain.chat_template


@pytest.mark.parametrize("whole", [True, False])
def test_a_tokenizer_is_saved_as_it_was(whole, tmp_path):
    folder = make(tmp_path / "source", "gpt2", whole=whole)
    plain = AutoTokenizer.from_pretrained(folder)
    load_tokenizer(folder).save_pretrained(tmp_path / "saved")
    assert tokens(AutoTokenizer.from_pretrained(tmp_path / "saved")) == tokens(plain)
    assert "sparsefw-" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
