"""Checkpoints that are read: what is refused, and why."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.checkpoints import TENSORS, refused, write_index
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file

from sparsefw.checkpoint import source, trust
from sparsefw.checkpoint.source import INDEX, SINGLE, companions, inspect, locate

# locate


@pytest.fixture
def offline(monkeypatch) -> list[str]:
    """Makes every download fail; a list of the ids that were asked for."""
    asked = []

    def fail(model, **_):
        asked.append(model)
        raise LocalEntryNotFoundError("Cannot reach the Hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    return asked


def test_locate_returns_a_local_folder_as_it_is(folder, offline, monkeypatch):
    assert locate(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert locate("source") == Path("source")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/source") == folder
    assert offline == []


@pytest.mark.parametrize("model", ["./no/where", "/no/where", "~/no-where", "~no-user/x", "../no-where", ""])
def test_locate_never_looks_a_path_up(model, offline):
    with refused("no such folder; give the folder of a checkpoint or a Hub id"):
        locate(model)
    assert offline == []


def test_locate_refuses_a_file(folder, offline, monkeypatch):
    monkeypatch.chdir(folder)
    with refused("config.json: a file; give the folder"):
        locate("config.json")
    assert offline == []


def test_locate_without_network_says_what_to_do_in_one_line(offline):
    with refused(r"^org/name: .*Cannot reach the Hub.*give the path of a local checkpoint$") as caught:
        locate("org/name")
    assert "\n" not in str(caught.value)
    assert offline == ["org/name"]


def test_locate_refuses_an_invalid_id(monkeypatch):
    def fail(*_, **__):
        raise HFValidationError("Repo id must be in the form")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with refused("a/b/c: neither a local path nor a valid Hub id"):
        locate("a/b/c")


def test_locate_downloads_what_is_copied_and_no_pickle_and_no_code(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        *("config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("chat_template.jinja", "additional_chat_templates/tool.jinja", "source.spm", "bpe.codes", "README.md"),
        *("LICENSE", "License.md", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "prophetnet.tokenizer"),
    ]
    unwanted = [
        *("pytorch_model.bin", "model.pt", "modeling_x.py", "consolidated.safetensors", "onnx/config.json", ".env"),
        *("original/consolidated.00.pth", "original/model.safetensors", "original/README.md", "figures/a.jpg"),
        *("additional_chat_templates/x.py", "other/additional_chat_templates/tool.jinja"),
    ]
    got, revisions = [], []

    def download(model, allow_patterns, ignore_patterns=None, revision=None):
        repository = [*wanted, *unwanted]
        got.extend(filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        revisions.append(revision)
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("org/name") == Path("/cache/snapshot")
    assert sorted(got) == sorted(wanted)
    # All of the same commit.
    assert revisions == [None, "snapshot"]


# inspect


def test_inspect_reads_one_file(folder):
    inspected = inspect(folder)
    assert inspected.folder == folder
    assert inspected.config == {"model_type": "llama"}
    assert {n: (t.file, t.dtype, t.shape) for n, t in inspected.tensors.items()} == {
        name: (folder / SINGLE, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    assert inspected.nbytes == sum(t.nbytes for t in TENSORS.values())
    # 22 bytes of bf16 against 8 of fp32 and 24 of integers.
    assert inspected.dtype == torch.bfloat16


def test_inspect_reads_shards(shards, folder):
    inspected = inspect(shards)
    assert inspected.tensors["b"].file == shards / "one.safetensors"
    assert inspected.tensors["n"].file == shards / "two.safetensors"
    assert {n: t.shape for n, t in inspected.tensors.items()} == {
        n: t.shape for n, t in inspect(folder).tensors.items()
    }


def test_dtype_is_the_one_of_most_bytes_not_of_most_tensors(folder):
    save_file({"a": torch.ones(9), "b": torch.ones(2).half(), "c": torch.ones(2).half()}, folder / SINGLE)
    assert inspect(folder).dtype == torch.float32


def test_not_a_checkpoint(folder, tmp_path):
    with refused("not a folder"):
        inspect(folder / SINGLE)
    with refused("no config.json"):
        inspect(tmp_path)
    (folder / SINGLE).unlink()
    with refused("neither model.safetensors nor model.safetensors.index.json"):
        inspect(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_never_read(folder, name):
    (folder / SINGLE).rename(folder / name)
    with refused(rf"{name}.*never read.*save_pretrained"):
        inspect(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\xef\xbb\xbf{}", b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_config_must_be_json(folder, text):
    (folder / "config.json").write_bytes(text)
    with refused("config.json: not JSON"):
        inspect(folder)


def test_config_must_be_an_object(folder):
    (folder / "config.json").write_text("[1]")
    with refused("config.json: expected a JSON object, got list"):
        inspect(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with refused("config.json: missing, or not a file"):
        inspect(folder)


@pytest.mark.parametrize("inner", [False, True])
def test_quantized_is_refused(folder, inner):
    config = {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if inner else config))
    with refused("config.json: the model is quantized"):
        inspect(folder)


def test_files_larger_than_any_real_one(folder, shards, monkeypatch):
    monkeypatch.setattr(trust, "MAX_INDEX_BYTES", 2**20)
    with (shards / INDEX).open("ab") as file:
        file.truncate(2**20 + 1)
    with refused(f"{INDEX}: more than 1 MiB, which no real one has"):
        inspect(shards)
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(source.MAX_COPIED_BYTES + 1)
    with refused("tokenizer.json: 256 MiB, more than any tokenizer has"):
        inspect(folder)
    (folder / "tokenizer.json").rename(folder / "notes.pdf")
    assert [path.name for path in companions(folder)] == ["config.json"]
    (folder / "config.json").write_bytes(b" " * 2**20 + b"{}")
    with refused("config.json: more than 1 MiB"):
        inspect(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b"no tensors " * 20])
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_file(folder, shards, damage, sharded):
    path = shards / "two.safetensors" if sharded else folder / SINGLE
    path.write_bytes(damage(path.read_bytes()))
    with refused(f"{path.name}: not a whole safetensors file"):
        inspect(path.parent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_dtype_that_cannot_be_pruned(folder, dtype):
    save_file({**TENSORS, "odd": torch.zeros(2, dtype=dtype)}, folder / SINGLE)
    with refused(r"model.safetensors: tensor odd has dtype \w+; give a checkpoint in fp32, fp16 or bf16"):
        inspect(folder)


def test_no_floating_point_tensor(folder):
    save_file({"n": TENSORS["n"]}, folder / SINGLE)
    with refused("no floating-point tensor"):
        inspect(folder)


@pytest.mark.parametrize("text", ["{", '{"weight_map": 3}', '{"weight_map": {}}', "{}"])
def test_damaged_index(shards, text):
    (shards / INDEX).write_text(text)
    with refused(rf"{INDEX}: (not JSON|no weight_map)"):
        inspect(shards)


@pytest.mark.parametrize(
    "shard",
    [
        *("../source/model.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..\\x.safetensors"),
        *("C:x.safetensors", "x\0.safetensors", "x.bin", "..", "", None, 3, ["one.safetensors"]),
        *("\x1b[31m.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"),
    ],
)
def test_index_that_leads_elsewhere(shards, folder, shard):
    write_index(shards, a=shard)
    with refused(rf"{INDEX}: tensor a is in .*not the name of a .safetensors file") as caught:
        inspect(shards)
    assert str(caught.value).isprintable()


def test_missing_shard(shards):
    (shards / "two.safetensors").unlink()
    with refused("two.safetensors: missing"):
        inspect(shards)


def test_tensor_missing_from_its_shard(shards):
    save_file({"a": TENSORS["a"]}, shards / "one.safetensors")
    with refused("one.safetensors: tensor b, which .* says is here, is missing"):
        inspect(shards)


def test_tensor_in_another_shard_than_the_index_says(shards):
    write_index(shards, a="one.safetensors", b="two.safetensors", c="two.safetensors", n="two.safetensors")
    with refused("two.safetensors: tensor b, which .* says is here, is missing"):
        inspect(shards)


def test_tensor_in_two_shards(shards):
    save_file({k: TENSORS[k] for k in "bcn"}, shards / "two.safetensors")
    with refused("two.safetensors: tensor b is in one.safetensors too"):
        inspect(shards)


def test_tensor_missing_from_the_index(shards):
    save_file({k: TENSORS[k] for k in "cn"} | {"extra": torch.ones(1)}, shards / "two.safetensors")
    with refused("two.safetensors: tensor extra is missing from the index"):
        inspect(shards)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_device, Path.mkdir])
def test_what_is_no_file_is_not_opened(folder, shards, make):
    for path in (folder / "config.json", folder / SINGLE, shards / INDEX, shards / "two.safetensors"):
        kept = path.read_bytes()
        path.unlink()
        make(path)
        with refused(f"{path.name}: missing, or not a file"):
            inspect(path.parent)
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(kept)
    make(folder / "tokenizer.json")
    if make == Path.mkdir:
        assert [path.name for path in companions(folder)] == ["config.json"]
    else:
        with refused("tokenizer.json: missing, or not a file"):
            inspect(folder)


def test_chat_templates_in_their_folder(folder, tmp_path):
    (tmp_path / "elsewhere").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "elsewhere")
    with refused("a.jinja: a link to .*elsewhere, outside of the checkpoint"):
        inspect(folder)
    (folder / "additional_chat_templates" / "a.jinja").unlink()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to("../config.json")
    inspect(folder)


def test_a_file_whose_name_cannot_be_printed(folder):
    (folder / "\x1b[31m.json").write_text("{}")
    with refused(r"a file is called \\x1b\[31m.json; remove it"):
        inspect(folder)


@pytest.mark.parametrize("path", ["config.json", "tokenizer_config.json"])
def test_what_is_read_as_a_tokenizer(folder, path):
    (folder / path).write_text('{"tokenizer_class": "LlamaForCausalLM"}')
    with refused(f"{path}: tokenizer_class LlamaForCausalLM is not the name of a tokenizer"):
        inspect(folder)
    (folder / path).write_text('{"fast_tokenizer_files": ["../tokenizer.4.0.json"]}')
    with refused(f"{path}: fast_tokenizer_files .* are not names of files beside it"):
        inspect(folder)
    (folder / path).write_text('{"tokenizer_class": "LlamaTokenizerFast", "fast_tokenizer_files": ["tokenizer.json"]}')
    inspect(folder)


def test_a_config_is_held_against_the_tensors(folder):
    (folder / "config.json").write_text('{"num_hidden_layers": 1000000}')
    with refused("config.json: num_hidden_layers asks for 1000000 parts, but there are 4 tensors"):
        inspect(folder)
    (folder / "config.json").write_text('{"text_config": {"vocab_size": 1099511627776}}')
    with refused("config.json: vocab_size is 1099511627776, but no tensor is larger than 5 in any way"):
        inspect(folder)
