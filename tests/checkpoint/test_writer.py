"""Checkpoints that are written: nothing half-done, nothing lost, and transformers loads them."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import TENSORS, contents, make_hub_cache, refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsefw.checkpoint import progress
from sparsefw.checkpoint.checksums import SUMS
from sparsefw.checkpoint.evidence import Evidence
from sparsefw.checkpoint.source import INDEX, SINGLE, inspect
from sparsefw.checkpoint.writer import Writer


def write(output: Path, source: Path, overwrite: bool = False) -> None:
    with Writer(output, 2, overwrite=overwrite) as writer:
        writer.write({"a": TENSORS["a"].T, "b": TENSORS["b"]})
        writer.write({"c": TENSORS["c"]})
        writer.finish(source)


def test_written_shards_index_and_files(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "report.json").write_text("old")
    (folder / "tokenizer.json").chmod(0o400)
    for name in ("modeling.py", "training_args.bin", "x.gguf", "pytorch_model.bin.index.json", "X.ONNX", SUMS):
        (folder / name).write_text("x")
    (folder / "sub").mkdir()
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool.jinja", "tool.py"):
        (folder / "additional_chat_templates" / name).write_text("x")
    output = tmp_path / "deep" / "er" / "pruned"
    with Writer(output, 2) as writer:
        writer.write({"a": TENSORS["a"].T, "b": TENSORS["b"]})
        writer.write({"c": TENSORS["c"]})
        (writer.folder / "report.json").write_text("new")
        writer.finish(folder)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = [*names, INDEX, "config.json", "tokenizer.json", "report.json", "additional_chat_templates/tool.jinja"]
    assert sorted(contents(output)) == sorted([*files, SUMS])
    # The system's own tool reads the digests.
    check = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=output, capture_output=True, text=True)
    assert (check.returncode, check.stdout.splitlines()) == (0, [f"{name}: OK" for name in sorted(files)])
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


def test_a_path_that_is_not_utf8(folder, tmp_path):
    """safetensors writes files there, and does not open them again: the run could not go on."""
    with refused(r"pruned\\udc80: no path in UTF-8"):
        write(tmp_path / "deep" / "pruned\udc80", folder)
    assert os.listdir(tmp_path) == [folder.name]
    with refused(r"model\\udcff/model.safetensors: no path in UTF-8, .*; rename it or the folder around it"):
        inspect(folder.rename(tmp_path / "model\udcff"))


def test_same_tensors_same_bytes(folder, tmp_path):
    write(tmp_path / "one", folder)
    write(tmp_path / "two", folder)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_hub_cache_as_source_gives_files_not_links(folder, tmp_path, hub):
    write(tmp_path / "pruned", make_hub_cache(folder, hub))
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
    assert caught.value.__notes__ == ["2 of 2 shards are finished: the same command goes on from there"]
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


# Finished parts that are damaged


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGES = {
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "link": replace_by_link,
    "folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.fixture
def unfinished(tmp_path):
    """The folder of an unfinished run with two parts of three, and files that are kept."""
    with suppress(KeyboardInterrupt), Writer(tmp_path / "pruned", 3) as writer:
        for n, name in enumerate("ab"):
            writer.keep(f"wanda-{n}", {name: TENSORS[name] + 1})
            writer.write({name: TENSORS[name]})
        raise KeyboardInterrupt
    return tmp_path / ".pruned.partial"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["new/model-00001-of-00003.safetensors", "new/model-00002-of-00003.safetensors", "kept/wanda-0.safetensors"]
)
def test_damaged_parts_are_named_and_nothing_is_deleted(unfinished, damage, name):
    DAMAGES[damage](unfinished / name)
    before = contents(unfinished)
    with refused(f"pruned: the unfinished run there is damaged, {name}: it .*; --restart discards it"):
        Writer(unfinished.parent / "pruned", 3).__enter__()
    assert contents(unfinished) == before


def test_what_takes_long_is_told(unfinished, monkeypatch, capsys):
    said: list[str] = []
    told, size = (
        progress.Progress(said.append, bar=False),
        sum(path.stat().st_size for path in unfinished.glob("*/*.safetensors")),
    )
    for bytes_, lines in ((size + 1, []), (size, ["hashing 0 GB: finished parts"])):
        monkeypatch.setattr(progress, "MANY_BYTES", bytes_)
        with suppress(KeyboardInterrupt), Writer(unfinished.parent / "pruned", 3, progress=told):
            raise KeyboardInterrupt
        assert said == lines
    assert capsys.readouterr() == ("", "")


def test_damaged_parts_are_discarded_by_restart(unfinished, folder, tmp_path):
    flip(unfinished / "new" / "model-00001-of-00003.safetensors")
    with Writer(tmp_path / "pruned", 3, restart=True) as writer:
        assert writer.finished == []
        for name in "abc":
            writer.write({name: TENSORS[name]})
        writer.finish(folder)
    assert inspect(tmp_path / "pruned").tensors.keys() == set("abc")


def test_what_no_record_names_never_reaches_the_output(unfinished, folder, tmp_path):
    """A kill may leave files half written, and what is not the run's has no place in its output."""
    for name in ("new/.model-00003.tmp", "new/evil.py", "new/tokenizer.json", "kept/wanda-2.safetensors"):
        (unfinished / name).write_text("old")
    (unfinished / "new" / "sub").mkdir()
    (unfinished / "new" / "link").symlink_to(folder)
    with Writer(tmp_path / "pruned", 3) as writer:
        assert sorted(os.listdir(writer.folder)) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
        assert sorted(os.listdir(unfinished / "kept")) == ["wanda-0.safetensors", "wanda-1.safetensors"]
        writer.write({"c": TENSORS["c"]})
        writer.finish(folder)
    assert (folder / SINGLE).exists()


# The source of the finished parts


def prune_one(folder: Path, output: Path) -> None:
    """Write the first of two shards, of the source's tensor `a`, and stop."""
    evidence = Evidence(inspect(folder))
    with suppress(KeyboardInterrupt), Writer(output, 2, evidence=evidence) as writer:
        writer.write(evidence.read({"a": inspect(folder).tensors["a"]}))
        raise KeyboardInterrupt


def test_parts_of_another_source_are_refused(folder, tmp_path):
    prune_one(folder, tmp_path / "pruned")
    save_file(TENSORS | {"a": TENSORS["a"] + 1}, folder / SINGLE)
    with refused(r"other input is there \(1 shards finished\): the model has another tensor a now; .*--restart"):
        Writer(tmp_path / "pruned", 2, evidence=Evidence(inspect(folder))).__enter__()
    # What no part was made of may change: the output is the same as if the run began now.
    save_file(TENSORS | {"b": TENSORS["b"] + 1}, folder / SINGLE)
    evidence = Evidence(inspect(folder))
    with Writer(tmp_path / "pruned", 2, evidence=evidence) as writer:
        writer.write(evidence.read({"b": inspect(folder).tensors["b"]}))
        writer.finish(folder)
    assert torch.equal(load_file(tmp_path / "pruned" / "model-00002-of-00002.safetensors")["b"], TENSORS["b"] + 1)
