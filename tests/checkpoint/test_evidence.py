"""What a run has read is known again wherever it lies, and every change of it is found."""

import os
import shutil

import pytest
import torch
from helpers.checkpoints import TENSORS, refused
from helpers.families import save_model
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint import evidence, progress
from sparsefw.checkpoint.evidence import Evidence, fingerprint
from sparsefw.checkpoint.progress import Progress
from sparsefw.checkpoint.source import SINGLE, inspect

# 2 MiB: more than any sample of its beginning.
LARGE = {"large": torch.arange(2**19, dtype=torch.float32), "other": torch.ones(3), "empty": torch.zeros(0, 3)}


@pytest.fixture
def large(tmp_path):
    """A checkpoint with a large tensor."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(LARGE, folder / SINGLE)
    return folder


def read(folder, *names):
    """Read these tensors, or all of them; returns what was read."""
    reader, tensors = Evidence(inspect(folder)), inspect(folder).tensors
    read = reader.read({name: tensors[name] for name in names or tensors})
    assert all(torch.equal(tensor, load_file(tensors[name].file)[name]) for name, tensor in read.items())
    return reader.take()


def difference(folder, taken):
    return Evidence(inspect(folder)).find_difference(taken)


def flip_last_bit(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_one_bit_at_the_end_of_a_tensor(large):
    taken = read(large)
    assert difference(large, taken) is None
    before = (large / SINGLE).stat()
    flip_last_bit(large / SINGLE)
    # The last of the tensors in the file.
    assert difference(large, taken) == "other"
    # Not even if the time of the change is put back.
    os.utime(large / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert difference(large, taken) == "other"
    flip_last_bit(large / SINGLE)
    assert difference(large, taken) is None
    changed = LARGE["large"].clone()
    changed[-1] += 1
    save_file(LARGE | {"large": changed}, large / SINGLE)
    assert difference(large, taken) == "large"


def test_what_was_not_read_does_not_count(large):
    taken = read(large, "large")
    save_file(LARGE | {"other": torch.zeros(3)}, large / SINGLE)
    assert difference(large, taken) is None


def test_another_place_and_other_files_are_the_same_model(large, tmp_path):
    taken = read(large)
    copy = shutil.copytree(large, tmp_path / "copy")
    assert difference(copy, taken) is None
    (copy / SINGLE).unlink()
    for name in LARGE:
        save_file({name: LARGE[name]}, copy / f"{name}.safetensors")
    weights = ", ".join(f'"{name}": "{name}.safetensors"' for name in LARGE)
    (copy / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weights}}}}}')
    assert difference(copy, taken) is None
    flip_last_bit(copy / "other.safetensors")
    assert difference(copy, taken) == "other"


def test_only_files_with_other_times_are_hashed(large, monkeypatch):
    taken, hashed, digest = read(large), [], evidence._digest
    monkeypatch.setattr(evidence, "_digest", lambda file, size: hashed.append(size) or digest(file, size))
    assert difference(large, taken) is None
    assert hashed == []
    os.utime(large / SINGLE)
    assert difference(large, taken) is None
    assert sorted(hashed) == [0, 12, 2**21]


def test_what_takes_long_is_told(large, monkeypatch):
    taken, said = read(large), []
    monkeypatch.setattr(progress, "MANY_BYTES", 2**21 + 12)
    told = Progress(said.append, bar=False)
    assert Evidence(inspect(large)).find_difference(taken, told) is None
    assert said == []
    os.utime(large / SINGLE)
    assert Evidence(inspect(large)).find_difference(taken, told) is None
    assert said == ["hashing 0 GB: tensors of files that are not what they were"]


def test_a_tensor_that_is_not_there_any_more(large):
    taken = read(large)
    save_file({"large": LARGE["large"]}, large / SINGLE)
    assert difference(large, taken) == "empty"


def test_each_tensor_is_taken_once(large):
    reader, tensors = Evidence(inspect(large)), inspect(large).tensors
    reader.read({"other": tensors["other"]})
    first = reader.take()
    assert [list(file.tensors) for file in first] == [["other"]]
    reader.read(tensors)
    second = reader.take()
    assert [sorted(file.tensors) for file in second] == [["empty", "large"]]
    reader.read(tensors)
    assert reader.take() == []
    # A later run does not take what it has compared.
    later = Evidence(inspect(large))
    assert later.find_difference(first + second) is None
    later.read(tensors)
    assert later.take() == []


def test_a_change_while_the_run_lives(large):
    reader, tensors = Evidence(inspect(large)), inspect(large).tensors
    reader.read({"other": tensors["other"]})
    # Another link is no change.
    os.link(large / SINGLE, large / "link")
    reader.read({"large": tensors["large"]})
    flip_last_bit(large / SINGLE)
    os.utime(large / SINGLE)
    with refused("model.safetensors: was changed since the run began"):
        reader.read({"large": tensors["large"]})


def test_the_same_size_and_times_in_another_file(large):
    """As archives unpack, all of whose files have one time."""
    taken = read(large)
    before = (large / SINGLE).stat()
    save_file(LARGE | {"other": torch.zeros(3)}, large / "new")
    (large / "new").replace(large / SINGLE)
    os.utime(large / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert difference(large, taken) == "other"


class TestFingerprint:
    def test_of_the_content_not_the_place(self, tmp_path):
        one = save_model(tmp_path / "one", "llama")
        tensors = {}
        for path in one.glob("*.safetensors"):
            tensors |= load_file(path)
        two = tmp_path / "two"
        two.mkdir()
        (two / "config.json").write_bytes((one / "config.json").read_bytes())
        save_file(tensors, two / SINGLE)
        assert fingerprint(inspect(one)) == fingerprint(inspect(two))

    def test_changes_with_a_name_a_shape_a_dtype_and_the_config(self, folder):
        before = fingerprint(inspect(folder))
        found = {before}
        for changed in (
            {("d" if name == "c" else name): tensor for name, tensor in TENSORS.items()},
            TENSORS | {"a": TENSORS["a"].T.contiguous()},
            TENSORS | {"a": TENSORS["a"].half()},
        ):
            save_file(changed, folder / SINGLE)
            found.add(fingerprint(inspect(folder)))
        save_file(TENSORS, folder / SINGLE)
        assert fingerprint(inspect(folder)) == before
        (folder / "config.json").write_text('{"model_type": "opt"}')
        assert len(found | {fingerprint(inspect(folder))}) == 5
