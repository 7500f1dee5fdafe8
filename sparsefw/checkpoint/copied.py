"""Files of a source that are copied to the output, by their names. Nothing else is copied.

Folders of checkpoints hold whatever somebody has left there: code, pickles, passwords, states of a training. So this is
a list of what belongs to a model, not of what does not.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from sparsefw.errors import shown

# transformers reads the files of this folder with the tokenizer.
TEMPLATES = "additional_chat_templates"

# Patterns of names in lower case.
COPIED = (
    *("config.json", "generation_config.json"),
    # Images, sound, video.
    *("*processor_config.json", "audio_tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja"),
    # Tokenizers; a test compares these with the names in the tokenizers of transformers.
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "vocab-*.json", "*_vocab.json", "merges.txt", "dict.txt", "bpe.codes"),
    *("tokenizer.model", "tokenizer.model.v*", "sentencepiece*.model", "spiece.model", "spm.model", "spm_char.model"),
    *("*.spm", "*.tiktoken", "tekken.json", "prophetnet.tokenizer"),
    *("normalizer.json", "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json"),
    # Terms of use, and the model card.
    *("licen[cs]e", "licen[cs]e*.md", "licen[cs]e*.txt", "notice", "notice.md", "notice.txt", "use_policy.md"),
    "readme.md",
)

# Endings of what a run writes itself, or writes anew: the source's are not missed.
_WRITTEN = (".safetensors", ".safetensors.index.json", "sha256sums", "report.json", "report.html")


def is_copied(name: str) -> bool:
    """Whether a file is copied; one in a folder is called `folder/name`."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in COPIED)


def in_any_case(pattern: str) -> str:
    """The same pattern for names with any capitals."""
    return re.sub(r"\[([a-z]+)\]|([a-z])", lambda m: f"[{(letters := m[1] or m[2])}{letters.upper()}]", pattern)


def note_of_others(folder: Path) -> list[str]:
    """A line that names what is not copied from a source's folder, but weights and hidden files; none without any."""
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and not is_copied(path.name)
        and path.name != TEMPLATES
        and not path.name.lower().endswith(_WRITTEN)
    ]
    if not others:
        return []
    named = ", ".join(shown(name, 60) for name in others[:3]) + (", ..." if len(others) > 3 else "")
    return [f"not copied, since they are no part of a checkpoint: {len(others)} files or folders ({named})"]
