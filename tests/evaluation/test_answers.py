"""Answers of a checkpoint: within memory limits, and after an interruption."""

import json
import os
import shutil

import pytest
import torch
from helpers.answering import REQUESTS, Stop, interrupt, interrupted_at, opened
from helpers.families import save_model
from helpers.requests import check_same
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint import resume
from sparsefw.errors import InputError
from sparsefw.evaluation import answers as answering
from sparsefw.evaluation import saved as saving
from sparsefw.evaluation.answers import Budget, scores_of
from sparsefw.evaluation.request import Request, Score
from sparsefw.evaluation.room import LOGITS, Room, memory_of_pass, room_for
from sparsefw.evaluation.streaming import RequestStates


def test_a_limit_that_is_too_low_names_one_that_is_enough(llama, answers):
    with pytest.raises(InputError, match=r"--host-memory 0.01: this run needs at least ([\d.]+) GiB") as error:
        scores_of(llama, REQUESTS, Budget(host_memory=0.01))
    enough = float(str(error.value).partition("at least ")[2].split()[0])
    lines = []
    # The process grows from run to run.
    check_same(scores_of(llama, REQUESTS, Budget(host_memory=enough + 0.05), say=lines.append), answers)
    assert any(line.startswith("memory: ") for line in lines)


def test_what_is_computed_is_told(llama):
    lines = []
    scores_of(llama, REQUESTS, Budget(), say=lines.append)
    tokens = sum(len(request.read) for request in REQUESTS)
    assert f"requests: {len(REQUESTS)} with {tokens} tokens, computed as" in lines[1]
    assert lines[1].endswith("beginnings shared")


def test_as_many_tokens_as_a_model_has_positions(tmp_path):
    """A row of 37 tokens would be padded to 38, and there is no position for the last one."""
    save_model(tmp_path, "gpt2", n_positions=37, max_position_embeddings=None)
    assert len(scores_of(tmp_path, [Request([*range(2, 39)], [5])], Budget())) == 1


def test_as_many_rows_as_tokens(tmp_path):
    """Where hidden states have tokens first, their shape does not show it then."""
    save_model(tmp_path, "xlnet")
    requests = [Request([*range(n, n + 20)], [n + 20]) for n in range(2, 23)]
    check_same(scores_of(tmp_path, requests[:20], Budget()), scores_of(tmp_path, requests, Budget())[:20])


def test_no_requests(llama):
    assert scores_of(llama, [], Budget()) == []


def test_a_target_that_the_model_does_not_know_is_refused(llama):
    """No row of the head has it, so nothing else would say so."""
    with pytest.raises(InputError, match=r"^token 258: the model embeds 258 tokens; give those of its own tokenizer"):
        scores_of(llama, [Request([5, 6], [258])], Budget())


def test_logits_that_overflow_are_refused(tmp_path):
    """Without a word, comparisons of NaN would choose among the answers."""
    folder = save_model(tmp_path / "model", "llama")
    shards = [path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path)]
    save_file(load_file(shards[0]) | {"model.norm.weight": torch.full((32,), 3e38)}, shards[0], {"format": "pt"})
    with pytest.raises(InputError, match=r"model: the log-likelihoods of \d+ of 28 requests are NaN"):
        scores_of(folder, REQUESTS, Budget())


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_interrupted_pass_goes_on(block, llama, answers, tmp_path, often, monkeypatch):
    interrupt(llama, tmp_path / "out", block)
    lines, advanced = [], []
    advance = RequestStates.advance
    monkeypatch.setattr(RequestStates, "advance", lambda self, i: advanced.append(i) or advance(self, i))
    with opened(tmp_path / "out") as saved:
        # The very same numbers.
        assert scores_of(llama, REQUESTS, Budget(), saved=saved, say=lines.append) == answers
        saved.finish({"a.json": "{}"})
    assert advanced == [*range(block, 3)]
    assert any("going on" in line for line in lines) == (block > 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a.json").read_text() == "{}"


def test_an_interruption_tells_what_the_same_command_does(llama, tmp_path, often):
    for block, notes in ((0, []), (1, ["the same command goes on from what was saved"])):
        with pytest.MonkeyPatch.context() as patched:
            interrupted_at(patched, block)
            with pytest.raises(Stop) as stopped, opened(tmp_path / "out") as saved:
                scores_of(llama, REQUESTS, Budget(), saved=saved)
            assert getattr(stopped.value, "__notes__", []) == notes

    def stop_behind_the_end(saved):
        saved.finish({"a.json": "{}"})
        raise Stop

    with pytest.raises(Stop) as stopped, opened(tmp_path / "out") as saved:
        stop_behind_the_end(saved)
    assert stopped.value.__notes__ == [f"{tmp_path / 'out'} is complete"]


def test_a_model_that_is_done_is_not_asked_again(llama, answers, tmp_path):
    with opened(tmp_path / "out") as saved:
        scores_of(llama, REQUESTS, Budget(), saved=saved)
    with opened(tmp_path / "out") as saved:
        assert scores_of(tmp_path / "is not there", REQUESTS, Budget(), saved=saved) == answers
        assert saved.answers(1, len(REQUESTS)) is None


def test_answers_are_kept_to_the_last_bit(tmp_path):
    scores = [Score(-1.1e-17 / 3, True), Score(float("-inf"), False), Score(-12345.678901234567, True)]
    with opened(tmp_path / "out") as saved:
        saved.add_answers(0, 3, scores)
    with opened(tmp_path / "out") as saved:
        assert saved.answers(0, 3) == scores


def test_only_the_last_hidden_states_are_kept(llama, tmp_path, often):
    interrupt(llama, tmp_path / "out", 2)
    kept = [path.name for path in (tmp_path / ".out.partial" / "kept").iterdir()]
    assert kept == ["states-00002-00000.safetensors"]


def test_hidden_states_are_not_saved_more_often_than_it_pays(llama, tmp_path):
    with opened(tmp_path / "out") as saved:
        scores_of(llama, REQUESTS, Budget(), saved=saved)
    assert not list((tmp_path / ".out.partial").glob("kept/*"))


# More rows of one length than a micro-batch holds, so that another size of micro-batches has others.
ALIKE = [Request([*range(n, n + 20)], [n + 20]) for n in range(2, 122)]


def in_memory_for(patched, room):
    """From now on, memory has just as much as this room takes."""

    def room_within(work, limits, *others):
        return room_for(work, {"host": memory_of_pass(work, room).host}, *others)

    patched.setattr(answering, "room_for", room_within)


@pytest.mark.parametrize("family", ["llama", "xlnet"])
@pytest.mark.parametrize("more", [True, False], ids=["more", "less"])
def test_a_pass_goes_on_in_its_own_micro_batches(more, family, tmp_path, often, monkeypatch):
    """Memory then has room for more tokens at a time, or only for fewer unless nothing is read ahead."""
    save_model(tmp_path / "model", family)
    # Otherwise the logits of a tiny model take more than all else, whatever the room.
    monkeypatch.setitem(LOGITS, False, 2**16)
    first, then = (Room(128), Room()) if more else (Room(), Room(ahead=False))
    in_memory_for(monkeypatch, first)
    lines = []
    whole = scores_of(tmp_path / "model", ALIKE, Budget(), say=lines.append)
    interrupt(tmp_path / "model", tmp_path / "out", 2, say=lines.append, requests=ALIKE)
    in_memory_for(monkeypatch, then)
    other = []
    scores_of(tmp_path / "model", ALIKE, Budget(), say=other.append)
    with opened(tmp_path / "out") as saved:
        # The very same numbers.
        assert scores_of(tmp_path / "model", ALIKE, Budget(), saved=saved, say=lines.append) == whole
    begun, interrupted, resumed, anew = (tokens_at_a_time(line) for line in [*lines, *other] if "at a time" in line)
    assert begun == interrupted == resumed != anew


def test_hidden_states_of_another_form_than_the_embeddings_go_on(tmp_path, often):
    """In half precision this model has its sums in fp32 behind the first block."""
    save_model(tmp_path / "model", "mamba", torch.bfloat16)
    whole = scores_of(tmp_path / "model", REQUESTS, Budget())
    interrupt(tmp_path / "model", tmp_path / "out", 2)
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / ".out.partial/records").glob("00002.json")]
    forms = [form for of_group in record["content"]["note"]["forms"][0] for form in of_group]
    assert {dtype for dtype, _ in forms} == {"torch.float32"}
    with opened(tmp_path / "out") as saved:
        assert scores_of(tmp_path / "model", REQUESTS, Budget(), saved=saved) == whole


def tokens_at_a_time(line):
    return int(line.partition(" tokens at a time")[0].split()[-1])


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "pipe", "link"])
def test_damaged_hidden_states_are_refused(damage, llama, answers, tmp_path, often, monkeypatch):
    interrupt(llama, tmp_path / "out", 2)
    (path,) = (tmp_path / ".out.partial" / "kept").iterdir()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    if damage in ("gone", "pipe", "link"):
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
        elif damage == "link":
            path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes(data if damage == "changed" else data[:-1]))
    with opened(tmp_path / "out") as saved, pytest.raises(InputError, match=r"damaged, kept/states-.*--restart"):
        scores_of(llama, REQUESTS, Budget(), saved=saved)
    with opened(tmp_path / "out", restart=True) as saved:
        assert scores_of(llama, REQUESTS, Budget(), saved=saved) == answers


RECORDS = {
    "no tokens": {"tokens": []},
    "a word for tokens": {"tokens": ["many"]},
    "too many tokens": {"tokens": [2**40]},
    "no blocks": {"blocks": 0},
    "too many blocks": {"blocks": 3},
    "no forms": {"forms": [[]]},
    "no dtype": {"form": ["torch.Tensor", [1]]},
    "no float": {"form": ["torch.int64", [1]]},
    "more than the file has": {"form": ["torch.float32", [2**40, 2**40]]},
    "less than the file has": {"form": ["torch.float32", [1]]},
    "no size": {"form": ["torch.float32", [-1, -1]]},
    "half a token": {"form": ["torch.float32", [0.5]]},
    "too many dimensions": {"form": ["torch.float32", [1] * 10**5]},
}


@pytest.mark.parametrize("changes", RECORDS.values(), ids=RECORDS)
def test_damaged_records_are_refused(changes, interrupted_llama, llama, tmp_path):
    shutil.copytree(interrupted_llama, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / ".out.partial/records").iterdir()
    part = json.loads(path.read_text())["content"]
    changes = dict(changes)
    if form := changes.pop("form", None):
        part["note"]["forms"][0][0][0] = form
    part["note"] |= changes
    resume._write_json(path, part)
    with pytest.raises(InputError, match=r"damaged, .*--restart") as error, opened(tmp_path / "out") as saved:
        scores_of(llama, REQUESTS, Budget(), saved=saved)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def interrupted_llama(llama, tmp_path_factory):
    """The folder of an unfinished pass."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saving, "SECONDS", 0.0)
        patched.setattr(saving, "TIMES", 0.0)
        interrupt(llama, folder / "out", 1)
    return folder


def test_answers_to_other_requests_are_refused(tmp_path):
    with opened(tmp_path / "out") as saved:
        saved.add_answers(0, 3, [Score(-1.0, True)])
    with opened(tmp_path / "out") as saved, pytest.raises(InputError, match="1 answers of a model to 2 requests"):
        saved.answers(0, 2)


def test_another_evaluation_does_not_go_on(llama, tmp_path):
    with opened(tmp_path / "out") as saved:
        scores_of(llama, REQUESTS, Budget(), saved=saved)
    with pytest.raises(InputError, match="what it is same then, other now"), opened(tmp_path / "out", "other"):
        pass


def test_one_at_a_time(tmp_path):
    second = opened(tmp_path / "out")
    with opened(tmp_path / "out"), pytest.raises(InputError, match="another run is writing it"):
        second.__enter__()


@pytest.mark.parametrize(
    ("family", "block"),
    # Blocks 4 and 5 of the Gemmas read keys and values of blocks 2 and 3, out of a mapping that all are given.
    [("gemma3n_text", 2), ("gemma3n_text", 5), ("gemma4_text", 5), ("qwen3_next", 2)],
)
def test_blocks_that_hand_on_more_begin_anew(family, block, tmp_path, often):
    """Hidden states are saved only where blocks hand on nothing else."""
    save_model(tmp_path / "model", family)
    whole = scores_of(tmp_path / "model", REQUESTS, Budget())
    lines = []
    interrupt(tmp_path / "model", tmp_path / "out", block, say=lines.append)
    with opened(tmp_path / "out") as saved:
        assert saved.blocks(0) == (0 if any("an interruption costs" in line for line in lines) else block)
        assert scores_of(tmp_path / "model", REQUESTS, Budget(), saved=saved) == whole


def test_there_is_no_gpu_limit_without_a_gpu(llama):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU; a machine without one runs this")
    with pytest.raises(InputError, match="--gpu-memory: no CUDA device"):
        scores_of(llama, REQUESTS, Budget(gpu_memory=1.0))
