"""Files that are copied to the output: all that belong to a model, and nothing else."""

import re
from pathlib import Path

import pytest
import transformers

from sparsefw.checkpoint.copied import is_copied, note_of_others
from sparsefw.checkpoint.source import companions


def test_all_files_of_all_tokenizers_of_transformers():
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for entries in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", path.read_text(encoding="utf-8")):
            names |= set(re.findall(r':\s*"([^"]+)"', entries))
    assert len(names) > 15
    assert [name for name in sorted(names) if not is_copied(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
        *("video_preprocessor_config.json", "image_processor_config.json", "special_tokens_map.json", "qwen.tiktoken"),
        *("chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja", "tokenizer.4.0.json"),
        *("LICENSE", "LICENSE.md", "License.txt", "LICENSE-APACHE.txt", "NOTICE", "USE_POLICY.md", "README.md"),
    ],
)
def test_belongs_to_a_model(name):
    assert is_copied(name)


@pytest.mark.parametrize(
    "name",
    [
        *("x.pyc", "x.so", "run.sh", "x.joblib", "x.npz", ".env", "secrets.json", "training.json"),
        *("x.py", "x.txt"),
        *("modeling.py", "LICENSE.py", "README.md.exe", "tokenizer.pkl", "tokenizer_config.json.bak", "vocab.pkl"),
        *("adapter_config.json", "report.json", "report.html", "SHA256SUMS", "model.safetensors.index.json", "x.model"),
        *("additional_chat_templates/x.py", "other/rag.jinja", "rag.jinja"),
    ],
)
def test_does_not(name):
    assert not is_copied(name)


def test_what_is_left_out_is_named(folder):
    assert note_of_others(folder) == []
    for name in (".env", "tokenizer.json", "x.so", "run.sh", "SHA256SUMS", "report.json", "a.npz", "b.joblib"):
        (folder / name).write_text("x")
    assert note_of_others(folder) == [
        "not copied, since they are no part of a checkpoint: 4 files or folders (a.npz, b.joblib, run.sh, ...)"
    ]
    assert [path.name for path in companions(folder)] == ["config.json", "tokenizer.json"]
    (folder / "\x1b[31m").write_text("x")
    assert note_of_others(folder)[0].isprintable()
