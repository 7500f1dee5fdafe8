"""Checkpoints that are written: nothing half-done, nothing lost, and transformers loads them."""

import json
import os
import shutil
import subprocess
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from helpers.checkpoints import TENSORS, contents, refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint import files
from sparsefw.checkpoint.files import SUMS
from sparsefw.checkpoint.source import INDEX, inspect
from sparsefw.checkpoint.writer import Writer

NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write_shards(writer: Writer, count: int) -> None:
    """Write those of the first shards that are not finished, with those of a compared method."""
    writer.choose({"batch": 3})
    for n, name in enumerate("ac"[:count]):
        if n >= len(writer.finished):
            tensors = {name: TENSORS[name].t()} | ({} if n else {"b": TENSORS["b"]})
            writer.write(n, tensors, [n], {"wanda": {name: TENSORS[name] + 1}})


def write(output: Path, source: Path, overwrite: bool = False, restart: bool = False) -> list:
    """Write what is not finished; returns the notes of what was."""
    with Writer(output, 2, {"x": (1, 2)}, source=source, overwrite=overwrite, restart=restart) as writer:
        finished = writer.finished
        write_shards(writer, 2)
        for n, name in enumerate("ac"):
            kept = load_file(writer.path(n, "wanda"))
            assert torch.equal(kept[name], TENSORS[name] + 1)
        (writer.folder / "report.json").write_text("new")
        writer.finish()
    return finished


def begin(output: Path, shards: int = 1, source: Path | None = Path("source")) -> Path:
    """Leave an unfinished run with some shards; returns its folder."""
    with suppress(KeyboardInterrupt), Writer(output, 2, {"x": (1, 2)}, source=source) as writer:
        write_shards(writer, shards)
        raise KeyboardInterrupt
    return output.with_name(f".{output.name}.partial")


def until(last: int, step):
    """The function `step`, which is interrupted the last time."""
    times = count(1)

    def do(*arguments, **options):
        if next(times) == last:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    return do


class TestOutput:
    def test_shards_index_and_files(self, folder, tmp_path):
        template = "additional_chat_templates/a.jinja"
        for name in ("tokenizer.json", "report.json", "modeling.py", "x.gguf", SUMS, template):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        (folder / "tokenizer.json").chmod(0o400)
        output = tmp_path / "deep" / "er" / "pruned"
        assert write(output, folder) == []
        names = [*NAMES, INDEX, "config.json", "tokenizer.json", "report.json", template]
        assert sorted(contents(output)) == sorted([*names, SUMS])
        # The system's own tool reads the digests.
        check = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=output, capture_output=True, text=True)
        assert (check.returncode, check.stdout.splitlines()) == (0, [f"{name}: OK" for name in sorted(names)])
        assert (output / "report.json").read_text() == "new"
        assert json.loads((output / INDEX).read_text()) == {
            "metadata": {"total_size": 12 + 10 + 8, "total_parameters": 6 + 5 + 2},
            "weight_map": {"a": NAMES[0], "b": NAMES[0], "c": NAMES[1]},
        }
        with safe_open(output / NAMES[1], "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert inspect(output).tensors["a"].shape == (3, 2)
        assert os.listdir(output.parent) == ["pruned"]

    def test_configs_without_code_and_quantization(self, folder, tmp_path):
        config = {"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}, "a": [{"auto_map": 1}], "n": float("nan")}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text('{"auto_map": {},"b":1}')
        (folder / "generation_config.json").write_text('{"auto_map": {},"b":1}')
        write(tmp_path / "pruned", folder)
        expected = {"model_type": "llama", "a": [{}], "n": float("nan")}
        assert (tmp_path / "pruned/config.json").read_text() == json.dumps(expected, indent=2) + "\n"
        assert json.loads((tmp_path / "pruned/tokenizer_config.json").read_text()) == {"b": 1}
        # A file that needs no change is copied byte by byte.
        assert (tmp_path / "pruned/generation_config.json").read_text() == '{"auto_map": {},"b":1}'

    @pytest.mark.parametrize("last", [1, 2, 3])
    def test_shards_that_replace_others(self, last, folder, tmp_path, monkeypatch):
        """An interruption comes before each of them moves into its place, and after all."""
        output = tmp_path / "pruned"

        def finish(last=99):
            with Writer(output, 2, source=folder) as writer, monkeypatch.context() as patch:
                for n in range(len(writer.finished), 4):
                    writer.write(n, {"ac"[n % 2]: TENSORS["b"] + n})
                assert [load_file(writer.latest(n))["ac"[n]][0] for n in range(2)] == [
                    TENSORS["b"][0] + n for n in (2, 3)
                ]
                patch.setattr(Path, "replace", until(last, Path.replace))
                writer.finish()

        with pytest.raises(KeyboardInterrupt):
            finish(last)
        finish()
        assert subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=output).returncode == 0
        assert all(torch.equal(load_file(output / NAMES[n])["ac"[n]], TENSORS["b"] + n + 2) for n in range(2))

    def test_an_older_output_is_replaced_as_a_whole(self, folder, tmp_path):
        (tmp_path / "disk").mkdir()
        output = tmp_path / "pruned"
        output.symlink_to(tmp_path / "disk" / "here")
        write(output, folder)
        (output / "left-over.json").write_text("{}")
        with refused("exists and is not empty"):
            write(output, folder)
        write(output, folder, overwrite=True)
        assert not (output / "left-over.json").exists()
        assert output.is_symlink()
        assert os.listdir(tmp_path / "disk") == ["here"]

    def test_what_the_disk_refuses(self, folder, tmp_path, monkeypatch):
        with pytest.raises(NotADirectoryError):
            write(folder / "config.json" / "pruned", folder)

        def fail(*_, **__):
            raise SafetensorError("I/O error: No space left on device")

        monkeypatch.setattr("sparsefw.checkpoint.writer.save_file", fail)
        with pytest.raises(SafetensorError):
            write(tmp_path / "x", folder)
        assert os.listdir(tmp_path) == ["source"]
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * 10**9))
        with (
            refused("x: 3.00 GB are still to be written, and the disk has 2.00 GB"),
            Writer(tmp_path / "x", 2) as writer,
        ):
            writer.check_space(2 * 10**9)
            writer.check_space(3 * 10**9)


class TestInterrupted:
    @pytest.mark.parametrize("old", [False, True])
    def test_nothing_is_left_behind_without_a_shard(self, folder, tmp_path, old):
        output = tmp_path / "deep" / "pruned"
        if old:
            write(output, folder)
        before = contents(tmp_path)
        with pytest.raises(KeyboardInterrupt), Writer(output, 2, overwrite=True):
            raise KeyboardInterrupt
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("owner", [files, Path, shutil])
    def test_an_end_at_any_step_is_resumed_to_the_same_bytes(self, folder, tmp_path, owner, monkeypatch):
        """Every step of the disk is one time the last, as of a process that is killed: nothing is tidied up."""
        name = {files: "_sync", Path: "rename", shutil: "rmtree"}[owner]
        write(tmp_path / "expected", folder)
        expected, step, output = contents(tmp_path / "expected"), getattr(owner, name), tmp_path / "pruned"
        write(output, folder)
        monkeypatch.setattr(Writer, "__exit__", lambda self, *error: self._lock.release())
        done, last = False, 0
        while not done:
            last += 1
            with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
                patched.setattr(owner, name, until(last, step))
                write(output, folder, overwrite=True)
                done = True
            write(output, folder, overwrite=True)
            assert contents(output) == expected
            shutil.rmtree(tmp_path / ".pruned.partial", ignore_errors=True)
        assert last > 2 or owner is shutil

    def test_the_older_output_comes_back(self, folder, tmp_path, monkeypatch):
        output, rename = tmp_path / "pruned", Path.rename
        write(output, folder)
        before = contents(output)

        def fail(self, target):
            if Path(target) == output and self.name == "new":
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", fail)
            with pytest.raises(KeyboardInterrupt) as caught:
                write(output, folder, overwrite=True)
        assert contents(output) == before
        assert caught.value.__notes__ == ["2 of 2 shards are finished: the same call goes on from there"]

    def test_what_appears_meanwhile_is_kept(self, folder, tmp_path):
        write(tmp_path / "other", folder)
        with refused("exists and is not empty"), Writer(tmp_path / "pruned", 1, source=folder) as writer:
            writer.write(0, TENSORS)
            (tmp_path / "other").rename(tmp_path / "pruned")
            writer.finish()
        assert "c" in load_file(tmp_path / "pruned" / NAMES[1])

    def test_what_no_record_names_never_reaches_the_output(self, folder, tmp_path):
        partial = begin(tmp_path / "pruned")
        for name in ("new/.model-00003.tmp", "new/evil.py", "new/tokenizer.json", "kept/wanda-00003.safetensors"):
            (partial / name).write_text("old")
        (partial / "new" / "link").symlink_to(folder)
        (partial / "new" / "sub").mkdir()
        assert write(tmp_path / "pruned", folder) == [[0]]
        assert sorted(contents(tmp_path / "pruned")) == sorted([*NAMES, INDEX, "config.json", "report.json", SUMS])
        assert os.listdir(folder)

    @pytest.mark.parametrize("content", [b"", b"{", b'{"names": 1}'])
    @pytest.mark.parametrize("name", ["identity.json", "records/00001.json"])
    def test_damage_is_named_and_nothing_is_deleted(self, folder, tmp_path, content, name):
        partial = begin(tmp_path / "pruned")
        (partial / name).write_bytes(content)
        before = contents(partial)
        with refused("pruned: the unfinished run there is damaged: .*; restart=True discards it"):
            write(tmp_path / "pruned", folder)
        assert contents(partial) == before
        assert write(tmp_path / "pruned", folder, restart=True) == []

    def test_another_run_is_refused(self, folder, tmp_path):
        begin(tmp_path / "pruned")
        with refused(r"an unfinished run of other input is there: x was \[1, 2\], and is \[1, 3\]; .*restart=True"):
            Writer(tmp_path / "pruned", 2, {"x": (1, 3)}).__enter__()
        begun = Writer(tmp_path / "pruned", 0).begun()
        assert begun == {"identity": {"x": [1, 2]}, "chosen": {"batch": 3}}
        assert not Writer(tmp_path / "pruned", 0, restart=True).begun()
        with Writer(tmp_path / "pruned", 2, {"x": (1, 2)}, source=folder) as writer:
            writer.write(1, {"c": TENSORS["c"]})
            writer.finish()

    def test_one_run_at_a_time(self, folder, tmp_path):
        with Writer(tmp_path / "pruned", 2, {"x": (1, 2)}, source=folder) as writer:
            with refused("pruned: another run is writing it; wait for its end or choose another folder"):
                write(tmp_path / "pruned", folder)
            writer.write(0, {"a": TENSORS["a"]})
            writer.write(1, {"c": TENSORS["c"]})
            writer.finish()
        with filelock.FileLock(tmp_path / "lock", timeout=0):
            write(tmp_path / "other", folder)


class TestSavedOtherwise:
    """A model whose library writes it in place of the shards."""

    @staticmethod
    def save(folder: Path) -> None:
        save_file({"x": TENSORS["a"]}, folder / NAMES[0])

    def finish(self, output: Path, save=None) -> None:
        with Writer(output, 2, {"x": (1, 2)}, overwrite=True) as writer:
            assert writer.finished == [[0], [1]]
            (writer.folder / "report.json").write_text("{}")
            assert writer.path(1).exists()
            (save or self.save)(writer.folder)
            writer.finish()

    def test_it_is_resumed_until_the_output_is_there(self, tmp_path):
        output = tmp_path / "pruned"
        begin(output, 2, source=None)

        def fail(folder):
            self.save(folder)
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            self.finish(output, fail)
        assert not output.exists()
        self.finish(output)
        assert sorted(contents(output)) == [SUMS, NAMES[0], "report.json"]
        assert load_file(output / NAMES[0]).keys() == {"x"}
        assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o644}
        assert os.listdir(tmp_path) == ["pruned"]
