"""Checkpoints that are written: nothing half-done, nothing lost, and transformers loads them."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import TENSORS, contents, make_hub_cache, refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsefw.checkpoint.source import INDEX, SINGLE, inspect
from sparsefw.checkpoint.writer import Writer, check_output


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
    with Writer(output, 2, overwrite=overwrite) as writer:
        writer.write({"a": TENSORS["a"].T, "b": TENSORS["b"]})
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
    with Writer(output, 2) as writer:
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
        with Writer(output, 2, overwrite=True):
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
            # The move away (0) or the move into place (1) fails; the move that restores does not.
            if len(moves) == moves_before + 1:
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        write(output, folder, overwrite=True)
    assert contents(output) == before
    assert caught.value.__notes__ == ["2 of 2 parts are finished: the same command goes on from there"]
    monkeypatch.undo()
    with Writer(output, 2, overwrite=True) as writer:
        assert writer.finished == [None, None]
        writer.finish(folder)
    assert contents(output) == before
    assert sorted(os.listdir(tmp_path)) == ["pruned", "source"]


def test_output_that_appears_meanwhile_is_kept(folder, tmp_path):
    output = tmp_path / "pruned"
    with refused("exists and is not empty"), Writer(output, 1) as writer:
        writer.write(TENSORS)
        write(tmp_path / "other", folder)
        (tmp_path / "other").rename(output)
        before = contents(output)
        writer.finish(folder)
    assert contents(output) == before


def test_writer_refuses_misuse(folder, tmp_path):
    with Writer(tmp_path / "x", 1) as writer:
        writer.write({"b": TENSORS["b"]})
        with pytest.raises(ValueError, match="b: this tensor was already written"):
            writer.write({"c": TENSORS["c"], "b": TENSORS["b"]})
        writer.finish(folder)
    assert inspect(tmp_path / "x").tensors.keys() == {"b"}
    with pytest.raises(ValueError, match="share memory"), Writer(tmp_path / "y", 1) as writer:
        writer.write({"a": TENSORS["a"], "b": TENSORS["a"]})
    with pytest.raises(ValueError, match="0 shards of 1 were written"), Writer(tmp_path / "y", 1) as writer:
        writer.finish(folder)
    with pytest.raises(RuntimeError, match=r"finish\(\) was not called"), Writer(tmp_path / "y", 1):
        pass
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def test_output_that_cannot_be_written(folder):
    with refused("cannot be written"), Writer(folder / "config.json" / "pruned", 1):
        pass


def test_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device\nmore")

    monkeypatch.setattr("sparsefw.checkpoint.writer.save_file", fail)
    with refused("writing failed: I/O error: No space left on device$"), Writer(tmp_path / "x", 1) as writer:
        writer.write(TENSORS)
    assert os.listdir(tmp_path) == ["source"]


def test_what_the_disk_has_no_room_for_is_not_begun(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * 10**9))
    with Writer(tmp_path / "x", 2) as writer:
        writer.write({"a": TENSORS["a"]})
        assert writer.written == TENSORS["a"].nbytes
        writer.check_space(2 * 10**9)
        with refused("x: 3.00 GB are still to be written, and the disk has 2.00 GB free; make space or choose"):
            writer.check_space(3 * 10**9)
        writer.write({"b": TENSORS["b"]})
        writer.finish(folder)


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
    inspected = inspect(source)
    assert ("lm_head.weight" in inspected.tensors) != tied
    tensors = load_file(source / SINGLE)
    with Writer(output, 3) as writer:
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
    assert again.nbytes == inspected.nbytes
    assert again.tensors.keys() == inspected.tensors.keys()
