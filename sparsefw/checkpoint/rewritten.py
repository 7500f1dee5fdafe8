"""Files of a source that are not copied to the output byte by byte, and what is written in their place.

A checkpoint's code is never copied, so `auto_map`, which names it, goes. What is written is not quantized, so the
quantization config goes, too. All other files are copied as they are.
"""

import json
from pathlib import Path
from typing import Any

from sparsefw.checkpoint import quantization, trust
from sparsefw.checkpoint.source import CONFIG, TOKENIZER_CONFIG, read_json

AUTO_MAP = "auto_map"

# Files that are read, the entries that are left out of them, and how large they may be.
LEFT_OUT = {
    CONFIG: ({AUTO_MAP, quantization.KEY}, trust.MAX_CONFIG_BYTES),
    TOKENIZER_CONFIG: ({AUTO_MAP}, trust.MAX_TOKENIZER_CONFIG_BYTES),
}


def rewritten(folder: Path) -> dict[str, str]:
    """The content of the files that are written in place of the source's, by name.

    Args:
        folder: folder of the source, which `inspect` has found sound.
    """
    texts = {}
    for name, (keys, limit) in LEFT_OUT.items():
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name, limit)
        changed = _without(content, keys)
        if name == CONFIG and quantization.given_in(content):
            _name_plain_dtype(changed)
        # NaN, which a config may hold, does not equal itself. As text it does.
        text = json.dumps(changed, indent=2) + "\n"
        if text != json.dumps(content, indent=2) + "\n":
            texts[name] = text
    return texts


def _without(value: Any, keys: set[str]) -> Any:
    """A JSON value without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return [_without(inner, keys) for inner in value] if isinstance(value, list) else value


def _name_plain_dtype(config: dict[str, Any]) -> None:
    """Take out a dtype that only a quantized model has: transformers would cast the weights to it."""
    if quantization.dtype_in(config) is None:
        for key in quantization.DTYPE_KEYS:
            config.pop(key, None)
