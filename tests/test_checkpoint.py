"""Checkpoints that are read: what is refused, and why."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import TENSORS, make_hub_cache, refused, write_index
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file

from sparsefw.checkpoint import INDEX, SINGLE, check_finite, inspect, locate

# locate


@pytest.fixture
def offline(monkeypatch) -> list[str]:
    """Every download fails; the ids asked for."""
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


@pytest.mark.parametrize("model", ["./no/where", "/no/where", "~/no-where", "../no-where", ""])
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
    with refused("a/b/c: neither a folder nor a valid Hub id"):
        locate("a/b/c")


def test_locate_downloads_no_pickle_and_no_code(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        *("config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("chat_template.jinja", "pytorch_model.bin", "model.pt", "modeling_x.py", "consolidated.safetensors"),
        *("onnx/config.json", "original/consolidated.00.pth", "original/model.safetensors"),
    ]
    got = []

    def download(model, allow_patterns, ignore_patterns):
        got.extend(filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("org/name") == Path("/cache/snapshot")
    assert got == repository[:7]


# inspect


def test_inspect_reads_one_file(folder):
    found = inspect(folder)
    assert found.folder == folder
    assert found.config == {"model_type": "llama"}
    assert {n: (t.file, t.dtype, t.shape) for n, t in found.tensors.items()} == {
        name: (folder / SINGLE, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    assert found.nbytes == sum(t.nbytes for t in TENSORS.values())
    # 22 bytes of bf16 against 8 of fp32 and 24 of integers.
    assert found.dtype == torch.bfloat16


def test_inspect_reads_shards(shards, folder):
    found = inspect(shards)
    assert found.tensors["b"].file == shards / "one.safetensors"
    assert found.tensors["n"].file == shards / "two.safetensors"
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.shape for n, t in inspect(folder).tensors.items()}


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


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
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
    config = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if inner else config))
    with refused("config.json: the model is quantized"):
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
    ],
)
def test_index_that_leads_elsewhere(shards, folder, shard):
    write_index(shards, a=shard)
    with refused(rf"{INDEX}: tensor a is in .*not the name of a .safetensors file"):
        inspect(shards)


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


def test_links_of_the_hub_cache(folder, shards, tmp_path):
    snapshot = make_hub_cache(folder, tmp_path / "hub")
    assert inspect(snapshot).tensors.keys() == TENSORS.keys()
    assert inspect(make_hub_cache(shards, tmp_path / "other")).tensors.keys() == TENSORS.keys()
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert inspect(link).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json"])
@pytest.mark.parametrize("cached", [False, True])
def test_links_to_elsewhere_are_refused(folder, tmp_path, name, cached):
    target = tmp_path / "elsewhere"
    target.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    if cached:
        folder = make_hub_cache(folder, tmp_path / "hub")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with refused(f"{name}: a link to .*elsewhere, outside of the checkpoint"):
        inspect(folder)


def test_a_folder_called_snapshots_is_no_hub_cache(folder, tmp_path):
    moved = tmp_path / "snapshots" / "abc"
    moved.parent.mkdir()
    folder.rename(moved)
    (moved / SINGLE).rename(tmp_path / "weights")
    (moved / SINGLE).symlink_to(tmp_path / "weights")
    with refused("outside of the checkpoint"):
        inspect(moved)


def test_dangling_link(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(folder / "gone")
    with refused("model.safetensors: missing"):
        inspect(folder)


# check_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_finite(dtype):
    tensor = torch.linspace(-1, 1, 37 * 131).view(37, 131).to(dtype)
    tensor[0, 0] = torch.finfo(dtype).max
    check_finite("w", tensor)
    check_finite("w", tensor.T)
    check_finite("w", tensor[:0])
    check_finite("n", torch.zeros(3, dtype=torch.int64))
    tensor[3, 5] = float("-inf")
    with refused("w: holds 0 NaN and 1 Inf among 4847 values"):
        check_finite("w", tensor)
    tensor[36, 130] = tensor[7, 7] = float("nan")
    with refused("w: holds 2 NaN and 1 Inf"):
        check_finite("w", tensor)
