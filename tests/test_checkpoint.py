"""Checkpoints: what is refused and why, and that transformers loads what is written."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsefw import checkpoint
from sparsefw.checkpoint import INDEX, SINGLE, Writer, check_finite, check_output, inspect, locate
from sparsefw.errors import InputError

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.ones(2),
    "n": torch.zeros(3, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, path / SINGLE)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same tensors in two shards."""
    path = tmp_path / "shards"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({k: TENSORS[k] for k in "ab"}, path / "one.safetensors")
    save_file({k: TENSORS[k] for k in "cn"}, path / "two.safetensors")
    write_index(path, a="one.safetensors", b="one.safetensors", c="two.safetensors", n="two.safetensors")
    return path


def write_index(folder: Path, **weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refused(match: str):
    return pytest.raises(InputError, match=match)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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


def make_hub_cache(folder: Path, root: Path) -> Path:
    """`folder` as the Hub's cache holds it: links to blobs."""
    snapshot = root / "models--org--name" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        (blobs / f"sha-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    return snapshot


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


# check_output


@pytest.mark.parametrize("output", ["source", "source/pruned", ".", "other/../source", "link", "link/pruned"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_must_not_meet_the_input(folder, tmp_path, output, overwrite):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(folder)
    with refused("is, holds or lies in the input folder"):
        check_output(tmp_path / output, folder, overwrite)


def test_output_must_not_meet_the_hub_cache_of_the_input(folder, tmp_path):
    snapshot = make_hub_cache(folder, tmp_path / "hub")
    with refused("is, holds or lies in the input folder"):
        check_output(snapshot.parent.parent / "blobs", snapshot, True)


def test_output_that_is_there_already(folder, tmp_path):
    output = tmp_path / "pruned"
    check_output(output, folder, False)
    output.mkdir()
    check_output(output, folder, False)
    (output / "notes.txt").write_text("mine")
    with refused("exists and is not empty; choose another --output or add --overwrite"):
        check_output(output, folder, False)
    with refused(r"not a checkpoint \(no config.json\), so --overwrite will not remove it"):
        check_output(output, folder, True)
    (output / "config.json").write_text("{}")
    check_output(output, folder, True)
    with refused("exists and is not empty"):
        check_output(output, folder, False)
    with refused("notes.txt: a file; --output is a folder"):
        check_output(output / "notes.txt", folder, True)


def test_output_that_is_a_mount_point(folder):
    with refused("a mount point"):
        check_output(Path("/proc"), folder, True)


# Writer


def write(output: Path, source: Path, overwrite: bool = False) -> None:
    with Writer(output, overwrite) as writer:
        writer.write({"a": TENSORS["a"].T, "b": TENSORS["b"]})
        writer.write({})
        writer.write({"c": TENSORS["c"]})
        writer.finish(source)


def test_written_shards_index_and_files(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "report.json").write_text("old")
    (folder / "tokenizer.json").chmod(0o400)
    for name in ("modeling.py", "training_args.bin", "x.gguf", "pytorch_model.bin.index.json", "X.ONNX"):
        (folder / name).write_text("x")
    (folder / "sub").mkdir()
    output = tmp_path / "deep" / "er" / "pruned"
    with Writer(output) as writer:
        writer.write({"a": TENSORS["a"].T, "b": TENSORS["b"]})
        writer.write({"c": TENSORS["c"]})
        (writer.folder / "report.json").write_text("new")
        writer.finish(folder)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(os.listdir(output)) == sorted([*names, INDEX, "config.json", "tokenizer.json", "report.json"])
    assert (output / "report.json").read_text() == "new"
    assert json.loads((output / INDEX).read_text()) == {
        "metadata": {"total_size": 12 + 10 + 8, "total_parameters": 6 + 5 + 2},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }
    assert torch.equal(load_file(output / names[0])["a"], TENSORS["a"].T)
    with safe_open(output / names[1], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert inspect(output).tensors["a"].shape == (3, 2)
    assert os.listdir(output.parent) == ["pruned"]


def test_permissions_are_the_usual_ones(folder, tmp_path):
    umask = os.umask(0o027)
    try:
        write(tmp_path / "pruned", folder)
    finally:
        os.umask(umask)
    assert (tmp_path / "pruned").stat().st_mode & 0o777 == 0o750
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "pruned").iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_same_tensors_same_bytes(folder, tmp_path):
    write(tmp_path / "one", folder)
    write(tmp_path / "two", folder)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_hub_cache_as_source_gives_files_not_links(folder, tmp_path):
    write(tmp_path / "pruned", make_hub_cache(folder, tmp_path / "hub"))
    assert not any(path.is_symlink() for path in (tmp_path / "pruned").iterdir())
    assert (tmp_path / "pruned" / "config.json").read_text() == '{"model_type": "llama"}'


def test_overwrite_replaces_all_of_the_older_output(folder, tmp_path):
    output = tmp_path / "pruned"
    write(output, folder)
    (output / "left-over.json").write_text("{}")
    with refused("exists and is not empty"):
        write(output, folder)
    assert (output / "left-over.json").exists()
    write(output, folder, overwrite=True)
    assert not (output / "left-over.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["pruned", "source"]


def test_output_through_a_link_goes_to_its_target(folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "pruned").symlink_to(tmp_path / "disk" / "here")
    write(tmp_path / "pruned", folder)
    assert (tmp_path / "pruned").is_symlink()
    assert (tmp_path / "disk" / "here" / INDEX).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_left_behind(folder, tmp_path, error, old):
    output = tmp_path / "deep" / "pruned"
    if old:
        write(output, folder)
        before = contents(output)

    def interrupted():
        with Writer(output, overwrite=True) as writer:
            writer.write(TENSORS)
            assert len(os.listdir(output.parent)) == 1 + old
            raise error

    with pytest.raises(error):
        interrupted()
    if old:
        assert contents(output) == before
        assert os.listdir(output.parent) == ["pruned"]
    else:
        assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("moves_before", [0, 1])
def test_older_output_comes_back_when_the_move_fails(folder, tmp_path, monkeypatch, moves_before):
    output = tmp_path / "pruned"
    write(output, folder)
    before = contents(output)
    rename, moves = Path.rename, []

    def fail(self, target):
        if self == output or Path(target) == output:
            moves.append(self)
            # The move away (0) or the move into place (1) fails, the one that restores does not.
            if len(moves) == moves_before + 1:
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        write(output, folder, overwrite=True)
    assert contents(output) == before
    assert sorted(os.listdir(tmp_path)) == ["pruned", "source"]


def test_output_that_appears_meanwhile_is_kept(folder, tmp_path):
    output = tmp_path / "pruned"
    with refused("exists and is not empty"), Writer(output) as writer:
        writer.write(TENSORS)
        write(output, folder)
        before = contents(output)
        writer.finish(folder)
    assert contents(output) == before
    assert sorted(os.listdir(tmp_path)) == ["pruned", "source"]


def test_writer_refuses_misuse(folder, tmp_path):
    with Writer(tmp_path / "x") as writer:
        writer.write({"b": TENSORS["b"]})
        with pytest.raises(ValueError, match="b: this tensor was already written"):
            writer.write({"c": TENSORS["c"], "b": TENSORS["b"]})
        writer.finish(folder)
    assert inspect(tmp_path / "x").tensors.keys() == {"b"}
    with pytest.raises(ValueError, match="share memory"), Writer(tmp_path / "y") as writer:
        writer.write({"a": TENSORS["a"], "b": TENSORS["a"]})
    with pytest.raises(ValueError, match="no shard was written"), Writer(tmp_path / "y") as writer:
        writer.finish(folder)
    with pytest.raises(RuntimeError, match=r"finish\(\) was not called"), Writer(tmp_path / "y") as writer:
        writer.write(TENSORS)
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def test_output_that_cannot_be_written(folder):
    with refused("cannot be written"), Writer(folder / "config.json" / "pruned"):
        pass


def test_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise checkpoint.SafetensorError("I/O error: No space left on device\nmore")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with refused("writing a shard failed: I/O error: No space left on device$"), Writer(tmp_path / "x") as writer:
        writer.write(TENSORS)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_written(tmp_path, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    source, output = tmp_path / "source", tmp_path / "pruned"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    found = inspect(source)
    assert ("lm_head.weight" in found.tensors) != tied
    tensors = load_file(source / SINGLE)
    with Writer(output) as writer:
        for block in ("layers.0.", "layers.1."):
            writer.write({name: tensor for name, tensor in tensors.items() if block in name})
        writer.write({name: tensor for name, tensor in tensors.items() if "layers." not in name})
        writer.finish(source)
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    state = model.state_dict()
    assert model.dtype == torch.bfloat16
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.int16), tensor.view(torch.int16)), name
    again = inspect(output)
    assert again.nbytes == found.nbytes
    assert again.tensors.keys() == found.tensors.keys()
