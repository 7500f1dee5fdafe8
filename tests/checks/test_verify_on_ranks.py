"""A verdict that ranks make together is that of one process, line for line, and each of them does its share."""

import contextlib
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.families import save_model
from helpers.ranks import on_ranks
from helpers.stacks import drawn
from helpers.verifying import DOWN, EMBEDDING, NORM, WANDA, Q, change_report, change_tensor, flip_bit, put, sum_again

from sparsefw import prune
from sparsefw.checkpoint.checksums import SUMS
from sparsefw.checkpoint.source import INDEX
from sparsefw.checks import lines, output, sums, verify
from sparsefw.commands import verify as command
from sparsefw.driver.in_memory import save
from sparsefw.errors import InputError
from sparsefw.model import StreamedModel
from sparsefw.ranks import ALONE, joining


def verdicts(ranks, cases):
    """The lines of the verdict on each output, by name; those of one process are the same."""
    return {name: [*lines(verify(folder, against, ranks=ranks))] for name, (folder, against) in cases.items()}


def failed(printed):
    """The names of the checks that failed."""
    return [line.split()[0] for line in printed if " FAILED (" in line]


@pytest.fixture(scope="module")
def sound(pruned, tmp_path_factory):
    """Outputs as they were written, with their sources and without, and the verdicts of one process on them."""
    folder = tmp_path_factory.mktemp("sound")
    model, batches = drawn("vit", 2)
    (folder / "vit").mkdir()
    save(model, folder / "vit")
    prune(model, folder / "vit pruned", calibration=batches, kernel="torch", method="wanda", sparsity="0.5")
    cases = {"batches": (folder / "vit pruned", None), "batches, with source": (folder / "vit pruned", folder / "vit")}
    for family in ("llama", "mixtral"):
        _, written = pruned(*WANDA, family=family)
        there = shutil.copytree(written, folder / family)
        change_report(there, lambda report: report["arguments"].update(model="gone"))
        sum_again(there)
        cases |= {f"{family}, with source": (written, None), family: (there, None)}
    cases = {name: (path, against and str(against)) for name, (path, against) in cases.items()}
    return cases, verdicts(ALONE, cases)


def change_kept(folder: Path) -> None:
    for name in (DOWN, Q):
        change_tensor(folder, name, lambda tensor: torch.where(tensor == 0, tensor, flip_bit(tensor)))


def change_others(folder: Path) -> None:
    for name in (EMBEDDING, NORM, NORM.replace(".1.", ".0.")):
        change_tensor(folder, name, put(1, flip_bit))


def fill(folder: Path) -> None:
    for name in (DOWN, Q):
        change_tensor(folder, name, put(slice(3, 7), 0.5))


def put_nan(folder: Path) -> None:
    for name in (DOWN, Q, EMBEDDING, "model.norm.weight"):
        change_tensor(folder, name, put(0, torch.nan))


def change_dtypes(folder: Path) -> None:
    for name in json.loads((folder / INDEX).read_text())["weight_map"]:
        change_tensor(folder, name, lambda tensor: tensor.half())


def change_claims(folder: Path) -> None:
    def change(report: dict) -> None:
        del report["layers"][0]
        report["layers"][3]["name"] = "model.layers.7.mlp.up_proj.weight"
        report["layers"][-1]["kept"] += 1

    change_report(folder, change)


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def change_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "more.py").write_text("")
    for path in (*folder.glob("*.safetensors"), folder / "config.json"):
        path.write_bytes(path.read_bytes() + b" ")


def lie_about_sizes(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["metadata"] = {}
    (folder / INDEX).write_text(json.dumps(index))


# What is done to an output, and the checks that must see it.
DAMAGE = {
    change_kept: "sums kept",
    change_others: "sums others",
    fill: "sums pattern kept",
    put_nan: "sums finite model",
    change_dtypes: "sums shapes kept others",
    change_claims: "sums report pattern others",
    truncate: "sums files",
    change_files: "sums files copied",
    lie_about_sizes: "sums files",
    lambda folder: change_tensor(folder, NORM, lambda tensor: None): "sums model",
    lambda folder: (folder / SUMS).unlink(): "sums",
    lambda folder: (folder / SUMS).write_text("nothing"): "sums",
}


@pytest.fixture(scope="module")
def damaged(pruned, tmp_path_factory):
    """Damaged outputs, and the verdicts of one process on them."""
    (_, written), folder = pruned(*WANDA), tmp_path_factory.mktemp("damaged")
    deeper = save_model(folder / "deeper", "llama")
    cases, seen = {"another source": (written, str(deeper))}, {"another source": "copied model"}
    for n, (damage, checks) in enumerate(DAMAGE.items()):
        name = f"{n} {damage.__name__}"
        damage(shutil.copytree(written, folder / name))
        cases |= {name: (folder / name, None)}
        seen |= {name: checks}
    alone = verdicts(ALONE, cases)
    assert {name: " ".join(failed(printed)) for name, printed in alone.items()} == seen
    return cases, alone


@pytest.mark.parametrize("count", [2, 3])
def test_sound_outputs(count, sound):
    cases, alone = sound
    assert not any(map(failed, alone.values()))
    assert all(any(re.match("all +[1-9]", line) for line in printed) for printed in alone.values())
    assert on_ranks(count, verdicts, cases) == [alone] * count


@pytest.mark.parametrize("count", [2, 3])
def test_damaged_outputs(count, damaged):
    cases, alone = damaged
    assert on_ranks(count, verdicts, cases) == [alone] * count


def test_each_rank_has_its_share(pruned):
    _, written = pruned(*WANDA)

    def shares(ranks):
        hashed, read, finite = [], [], []
        digest, read_block, look = sums.file_digest, StreamedModel.read, output.check_finite
        sums.file_digest = lambda path: hashed.append(path.name) or digest(path)
        StreamedModel.read = lambda model, i: read.append(i) or read_block(model, i)
        output.check_finite = lambda name, tensor: finite.append(name) or look(name, tensor)
        verify(written, ranks=ranks)
        return [name for name in hashed if name != SUMS], read, finite

    hashed, read, finite = zip(*on_ranks(2, shares), strict=True)
    assert sorted(hashed[0] + hashed[1]) == sorted(path.name for path in written.iterdir() if path.name != SUMS)
    assert all(any(name.endswith(".safetensors") for name in names) for names in hashed)
    # Each block is read once of the output and once of the source, and so is what lies outside of them.
    assert [Counter(blocks) for blocks in read] == [Counter({0: 2, None: 1}), Counter({1: 2, None: 1})]
    assert all(finite)
    assert Counter(finite[0] + finite[1]).most_common(1)[0][1] == 1


def blind(number, owner, name, value):
    """A rank sees something else than the others; returns what they all say."""

    def do(ranks, folder):
        if ranks.number == number:
            setattr(owner, name, value)
        with pytest.raises(InputError) as error:
            verify(folder, ranks=ranks)
        return str(error.value)

    return do


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (output, "file_digest", lambda path: "of another report"),
        (output, "_find_source", lambda *arguments: (None, "not here")),
        (sums, "read_sums", lambda path: {}),
        # One rank is through while others have checks before them.
        (output, "_check_model", lambda *arguments: {}),
        (sums, "_entries", lambda folder: set()),
    ],
)
def test_ranks_that_see_other_files(owner, name, value, pruned):
    _, written = pruned(*WANDA)
    message = "rank 1 sees other files than rank 0; put the output and its source where all machines see them"
    assert on_ranks(2, blind(1, owner, name, value), written) == [message] * 2


def test_ranks_that_do_not_see_the_output(pruned):
    _, written = pruned(*WANDA)
    message = f"{written}: rank 2 does not see it; put it where all machines see it"
    assert on_ranks(3, blind(2, Path, "is_dir", lambda path: False), written) == [message] * 3


def test_ranks_with_other_arguments(pruned):
    _, written = pruned(*WANDA)

    def do(ranks):
        with pytest.raises(InputError, match=r"^rank 1: --against is 1, and that of rank 0 is 0; start all ranks"):
            verify(written, str(ranks.number), ranks=ranks)

    on_ranks(2, do)


def test_the_command_says_why_it_fails_before_a_rank_ends(copied):
    """A launcher interrupts all ranks once one has ended with a failure. No rank takes a GPU: there may be fewer."""
    _, written = copied(*WANDA)

    def run(ranks):
        left = []
        # As if the launcher had connected them, on a machine with GPUs.
        os.environ.update({"RANK": str(ranks.number), "WORLD_SIZE": str(ranks.count)})
        joining._open.append(
            SimpleNamespace(
                number=ranks.number,
                count=ranks.count,
                begun=0,
                leave=lambda *failure: left.append(failure),
                long_work=contextlib.nullcontext,
                meet=dist.barrier,
            )
        )
        joining.torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, set_device=pytest.fail))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = command.run([str(written)])
        return status, left, printed.getvalue().splitlines()

    alone = verdicts(ALONE, {"": (written, None)})[""]
    assert on_ranks(2, run) == [(0, [], alone)] * 2
    (written / "more.py").write_text("")
    alone = verdicts(ALONE, {"": (written, None)})[""]
    assert failed(alone) == ["sums"]
    assert on_ranks(2, run) == [(1, [(1, "a check failed")], alone), (1, [], alone)]
