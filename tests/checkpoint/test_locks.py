"""Runs into one folder, into folders above it and into folders inside it: one at a time."""

import os
from contextlib import suppress

import pytest
from helpers.checkpoints import TENSORS, contents, refused

from sparsefw.checkpoint.writer import Writer


@pytest.mark.parametrize(("first", "second"), [("x", "x/sub"), ("x", "x/deep/sub")])
def test_a_run_inside_the_output_of_a_live_one(folder, tmp_path, first, second):
    with Writer(tmp_path / first, 1) as writer:
        before = contents(tmp_path)
        with refused(f"{second}: a run is writing .*{first}, in which it lies"):
            Writer(tmp_path / second, 1).__enter__()
        assert contents(tmp_path) == before
        writer.write(TENSORS)
        writer.finish(folder)
    with Writer(tmp_path / second, 1) as writer:
        writer.write(TENSORS)
        writer.finish(folder)


@pytest.mark.parametrize("inner", ["sub", "deep/er/sub"])
def test_a_run_above_the_output_of_a_live_one(folder, tmp_path, inner):
    output = tmp_path / "x"
    output.mkdir()
    (output / "config.json").write_text("{}")
    with Writer(output / inner, 1) as writer:
        before = contents(tmp_path)
        with refused("x: a run is writing into it"):
            Writer(output, 1, overwrite=True).__enter__()
        assert contents(tmp_path) == before
        writer.write(TENSORS)
        writer.finish(folder)


def test_what_is_no_lock_is_not_waited_for(folder, tmp_path):
    output = tmp_path / "x"
    (output / ".y.partial").mkdir(parents=True)
    os.mkfifo(output / ".y.partial" / "lock")
    (output / "config.json").write_text("{}")
    with Writer(output, 1, overwrite=True) as writer:
        writer.write(TENSORS)
        writer.finish(folder)


def test_a_lock_that_is_a_link(tmp_path):
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "lock").symlink_to(tmp_path / "made")
    with refused("x: cannot be written"):
        Writer(tmp_path / "x", 1).__enter__()
    assert not (tmp_path / "made").exists()


def test_a_run_into_the_folder_of_an_unfinished_one(folder, tmp_path):
    with suppress(KeyboardInterrupt), Writer(tmp_path / "x", 2) as writer:
        writer.write(TENSORS)
        raise KeyboardInterrupt
    with refused("lies in .*.x.partial, the folder of an unfinished run"):
        Writer(tmp_path / ".x.partial" / "new" / "y", 1).__enter__()
    # Beside it and inside the output that it will have, there is no live run in the way.
    for place in ("y", "x/sub"):
        with Writer(tmp_path / place, 1) as writer:
            writer.write(TENSORS)
            writer.finish(folder)
