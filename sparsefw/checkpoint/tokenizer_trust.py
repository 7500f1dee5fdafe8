"""Checks of the files that a tokenizer is made of, and the entries of them that transformers may see.

transformers hands every entry of tokenizer_config.json to the tokenizer's class, and classes open what some of them
name. So only entries that no class takes for a file are handed on. What a class would follow, and cannot be left out
without a change of the tokens, is refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsefw.checkpoint.transformers_names import is_tokenizer_class, public_names, tokenizer_class_of
from sparsefw.checkpoint.trust import entries, is_plain
from sparsefw.errors import InputError, shown

# Entries that no class of transformers takes for the name of a file. Others are not handed on.
SAFE = {
    *("add_blank", "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder"),
    *("additional_special_tokens", "auto_map", "cell_trim_length", "chat_control_tokens", "chat_template"),
    *("clean_text", "clean_up_tokenization_spaces"),
    *("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "cls_token_box"),
    *("default_velocity", "do_basic_tokenize", "do_clean_text", "do_lower_case", "do_lowercase"),
    *("do_lowercase_and_remove_accent", "do_phonemize", "do_split_on_punc", "do_subword_tokenize", "do_upper_case"),
    *("do_word_tokenize", "entity_token_1", "entity_token_2", "errors", "extra_ids", "extra_special_tokens"),
    *("fast_tokenizer_files", "fix_mistral_regex", "id2lang", "is_uroman", "keep_accents", "lang2id", "lang_codes"),
    *("langs", "language", "language_codes", "legacy", "legacy_behaviour", "mask_token_sent", "max_column_id"),
    *("max_depth", "max_entity_length", "max_input_chars_per_word", "max_len", "max_length", "max_mention_length"),
    *("max_question_length", "max_row_id", "max_width", "min_question_length", "model_input_names"),
    *("model_max_length", "model_specific_special_tokens", "never_split", "normalization", "normalize"),
    *("normalize_text", "num_bars", "num_madeup_words", "offset", "only_label_first_subword", "pad_to_multiple_of"),
    *("pad_token_box", "pad_token_label", "pad_token_type_id", "pad_width", "padding_side", "phonemize"),
    *("phonemizer_backend", "phonemizer_lang", "predict_timestamps", "processor_class", "remove_space"),
    *("replace_word_delimiter_char", "response_schema", "response_template", "return_token_type_ids"),
    *("sep_token_box", "separate_vocabs", "should_strip_spaces", "source_lang", "special_tokens_pattern"),
    *("split_by_punct", "split_special_tokens", "src_lang", "stride", "strip_accents", "strip_column_names"),
    *("subword_tokenizer_type", "tags_dict", "target_lang", "task", "tgt_lang"),
    *("token_type_ids_include_special_tokens", "token_type_ids_pattern", "tokenize_chinese_chars"),
    *("tokenizer_class", "trim_offsets", "truncation_side", "truncation_strategy", "unk_id"),
    *("update_answer_coordinates", "use_default_system_prompt", "use_source_tokenizer", "word_tokenizer_type"),
    "wordpieces_prefix",
}
# Entries that classes of transformers follow, to a file or into another library. Real ones are empty. Names of files
# (vocab_file and the like) are not among them: real configs hold paths of the machine that they were saved on, and
# transformers replaces these by the files beside the config.
FOLLOWED = {
    *("_spm_precompiled_charsmap", "entity_vocab", "generator", "gguf_file", "init_inputs", "jumanpp_kwargs"),
    *("mecab_kwargs", "merges", "post_processor", "question_encoder", "sp_model_kwargs", "sudachi_kwargs"),
    *("tokenizer_object", "tokenizer_padding", "tokenizer_path", "tokenizer_truncation", "vocab"),
}

# The parts of tokenizer.json that say what is done with a text. Its vocabulary is as large as the file at most.
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
# Real tokenizers have 30 components, nested 4 deep, patterns of 2,000 characters and replacements of 20.
MAX_COMPONENTS = 1000
MAX_NESTED = 16
MAX_PATTERN = 2**14
MAX_REPLACEMENT = 256
REPLACEMENTS = {"content", "prepend", "replacement", "prefix", "suffix", "pad_token"}
# Real ones have 400,000 characters.
MAX_CHARSMAP = 2**22


def check_tokenizer(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that makes transformers read something else as a tokenizer.

    Args:
        config: the content of tokenizer_config.json, or of config.json.
        path: the file's path, for the message.

    Raises:
        InputError: the class is no tokenizer (a model's would be loaded with its weights, pickled ones too), or a file
            lies elsewhere.
    """
    name = config.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _is_tokenizer(name)):
        raise InputError(f"{path}: tokenizer_class {shown(name)} is not the name of a tokenizer")
    for key, value in entries(config, path):
        if key == "model_type" and isinstance(value, str) and not _is_tokenizer(tokenizer_class_of(value)):
            # Their class reads several parts, each from a folder of its own that nothing has checked.
            raise InputError(f"{path}: models of type {shown(value)} have no tokenizer that can be trusted")
    files = config.get("fast_tokenizer_files", [])
    if not isinstance(files, list) or not all(isinstance(file, str) and is_plain(file) for file in files):
        raise InputError(f"{path}: fast_tokenizer_files {shown(files)} are not names of files beside it")


def _is_tokenizer(name: str) -> bool:
    """Whether all that transformers knows under a name is a tokenizer. It tries the name with "Fast" and without."""
    stem = re.sub("(Fast)+$", "", name)
    for candidate in {name, f"{name}Fast", stem, f"{stem}Fast"} & public_names():
        # Other names are refused without a look: to look a name up is to import what it stands for.
        if not candidate.endswith(("Tokenizer", "TokenizerFast", "Backend")) or not is_tokenizer_class(candidate):
            return False
    return True


def check_followed(config: dict[str, Any], path: Path) -> None:
    """Refuse entries that transformers would follow to what was not checked, and that the tokens depend on.

    Args:
        config: the content of tokenizer_config.json or special_tokens_map.json.
        path: the file's path, for the message.

    Raises:
        InputError: there is one.
    """
    for key in sorted(FOLLOWED & config.keys()):
        if config[key] not in (None, {}, [], ""):
            raise InputError(
                f"{path}: {key} {shown(config[key])} would be followed out of the checkpoint; remove the entry, and "
                "put the files of the tokenizer beside it"
            )


def handed_on(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that transformers may see: those that are safe, and special tokens."""
    return {key: value for key, value in config.items() if key in SAFE or _is_token(key, value)}


def _is_token(key: str, value: object) -> bool:
    return key.endswith("_token") and isinstance(value, str | dict | None)


def check_pipeline(content: object, path: Path) -> None:
    """Refuse a tokenizer that does more with a text than any real one, at a look; its vocabulary is not looked at.

    Args:
        content: the content of tokenizer.json.
        path: the file's path, for the message.

    Raises:
        InputError: it is no object, has too many components or nests them too deeply, or a text of it is too long.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; download or copy it again")
    components = 0
    for key, value, depth in _within({part: content.get(part) for part in PARTS}):
        components += isinstance(value, dict | list)
        if components > MAX_COMPONENTS or depth > MAX_NESTED:
            raise InputError(
                f"{path}: more than {MAX_COMPONENTS} components, or nested more than {MAX_NESTED} deep; no tokenizer is"
            )
        longest = MAX_CHARSMAP if key == "precompiled_charsmap" else MAX_PATTERN
        longest = MAX_REPLACEMENT if key in REPLACEMENTS else longest
        if isinstance(value, str) and len(value) > longest:
            raise InputError(f"{path}: {shown(key)} has {len(value)} characters, more than any tokenizer has")


def _within(content: dict[str, Any]) -> Iterator[tuple[str, object, int]]:
    """All values in nested objects and lists, with their key and depth; elements of a list come under its key."""
    pending: list[tuple[str, Any, int]] = [("", content, 0)]
    while pending:
        key, value, depth = pending.pop()
        inner = value.items() if isinstance(value, dict) else ((key, element) for element in value)
        for name, element in inner:
            yield name, element, depth + 1
            if isinstance(element, dict | list):
                pending.append((name, element, depth + 1))
