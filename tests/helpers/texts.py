"""Shared by the tests of texts and windows: a tokenizer of one token per byte, files of records, expected refusals."""

import json
from pathlib import Path

from helpers.checkpoints import refused as refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsefw.data.windows import Windows, WindowStream

BOS = 256


def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token per byte, of which no two merge; 256 at the start if `bos`, 257 at the end."""
    vocabulary = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": BOS, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        specials = [("<s>", BOS), ("</s>", 257)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    # A maximum far below the length of the texts, and a stored truncation: neither may matter.
    tokenizer.enable_truncation(7)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=7,
        clean_up_tokenization_spaces=False,
    )


def calibration_windows(tokenizer, dataset, write=None, **sizes) -> Windows:
    """The calibration windows of a run."""
    return WindowStream(tokenizer, dataset, write=write, **sizes).take(sizes["nsamples"])


def records(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def replace_hub(monkeypatch, load) -> None:
    """Have `load` give the records of a dataset, or of its splits, in place of the Hub."""
    monkeypatch.setattr("datasets.load_dataset", load)
