"""Runs that are killed anywhere go on where they were, and end with the bytes of an undisturbed one."""

import os
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import TEXT, interrupted_at, killed_at, make_place, report_of
from helpers.families import save_model
from safetensors.torch import load_file

from sparsefw.checkpoint.files import SUMS, file_digest
from sparsefw.extras.verification import read_sums
from sparsefw.run import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text, and the output of an undisturbed run; all runs of this file have one thread."""
    threads = torch.get_num_threads()
    # A run goes on with as many threads as it began with, and a forked process has none of its parent's.
    torch.set_num_threads(1)
    folder = make_place(tmp_path_factory.mktemp("resume"), "qwen3_moe", torch.bfloat16)
    assert run(folder, "undisturbed") == 0
    yield folder
    torch.set_num_threads(threads)


def run(place, output, *more):
    text = str(place / "text.txt")
    flags = ["--nsamples", "4", "--seqlen", "32", "--steps", "2", "--reconstruct", "0", "--kernel", "torch"]
    flags += ["--sparsity", "0.5", "--refit", "1", "--rounds", "0", "--recover", "0"]
    flags += ["--compare", "sparsegpt", "--eval", text, "--eval-windows", "2"]
    return main(["--model", str(place / "model"), "--dataset", text, "--output", str(place / output), *flags, *more])


def content(place, output):
    """All files but the report, which holds times, its digest, and the card, which has its name; and the results."""
    folder = place / output
    assert {name: file_digest(folder / name) for name in read_sums(folder / SUMS)} == read_sums(folder / SUMS)
    others = ("report.json", "report.html", SUMS, "README.md")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in others}
    report = report_of(folder)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in report["layers"]]
    return files, rows, report["kept_dense"], report["evaluation"], [block["name"] for block in report["blocks"]]


@pytest.mark.parametrize("n", [16, 33])
def test_killed_ends_with_the_same_bytes(place, n, capsys):
    output = f"killed-{n}"
    killed_at(n, lambda: run(place, output))
    finished = len(list((place / f".{output}.partial" / "records").glob("*.json")))
    assert run(place, output) == 0
    said = f"resuming an unfinished run: {finished} of 4 shards are finished"
    assert (said in capsys.readouterr().out) == (finished > 0)
    assert content(place, output) == content(place, "undisturbed")


def test_a_model_that_computes_in_fp32_goes_on_with_the_same_bytes(place, monkeypatch):
    """Windows that move on stage by stage have to see rounded weights, as they do where a finished block is read."""
    monkeypatch.setattr("sparsefw.arithmetic.slowdown", lambda dtype: 20.0)
    assert run(place, "in-fp32") == 0
    with interrupted_at(20):
        assert run(place, "in-fp32-interrupted") == 130
    assert run(place, "in-fp32-interrupted") == 0
    assert content(place, "in-fp32-interrupted") == content(place, "in-fp32")


def test_a_resumed_run_makes_again_what_finished_blocks_hand_on(tmp_path, capsys):
    """Later blocks read keys and values of the blocks that are finished, as each method has pruned them."""
    make_place(tmp_path, "gemma3n_text")
    assert run(tmp_path, "undisturbed") == 0
    # The last two of the six blocks share what the two before them make.
    with interrupted_at(28):
        assert run(tmp_path, "interrupted") == 130
    assert " of 7 shards are finished" in capsys.readouterr().err
    assert run(tmp_path, "interrupted") == 0
    finished = int(capsys.readouterr().out.partition("unfinished run: ")[2][0])
    assert finished >= 4
    assert content(tmp_path, "interrupted") == content(tmp_path, "undisturbed")


def test_other_arguments_model_or_text_are_refused(place, tmp_path, capsys):
    def refused(*more, said):
        assert run(place, "other", *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error

    with interrupted_at(14):
        assert run(place, "other") == 130
    assert " of 4 shards are finished" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text(TEXT[100:])
    another = str(save_model(tmp_path / "model", "qwen3_moe", torch.bfloat16, seed=1))
    refused("--sparsity", "0.6", said="--sparsity was 0.5, and is 0.6")
    refused("--model", another, said="the model's files was ")
    refused("--dataset", str(tmp_path / "text.txt"), said="the calibration text ")
    refused("--eval", str(place / "text.txt"), said="--eval was ")
    # Neither where the model lies nor what a solve may take changes the result.
    os.rename(place / "model", place / "moved")
    try:
        assert run(place, "other", "--model", str(place / "moved"), "--host-memory", "4") == 0
    finally:
        os.rename(place / "moved", place / "model")
    assert content(place, "other") == content(place, "undisturbed")


def test_a_resumed_run_needs_disk_space_for_the_rest_alone(place, monkeypatch, capsys):
    """The last block by both methods, and the other tensors."""
    with interrupted_at(19):
        assert run(place, "full") == 130
    assert "2 of 4 shards are finished" in capsys.readouterr().err
    shards = [load_file(place / "undisturbed" / f"model-0000{n}-of-00004.safetensors") for n in (3, 4)]
    third, outside = (sum(tensor.nbytes for tensor in shard.values()) for shard in shards)
    free = [2 * third + outside - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    assert run(place, "full") == 2
    assert "GB free; make space or choose another folder; 2 of 4 shards are" in capsys.readouterr().err
    free[0] += 1
    assert run(place, "full") == 0
    assert content(place, "full") == content(place, "undisturbed")
