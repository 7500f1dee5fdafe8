"""The recovery at the end of a run: what it gains, how it goes on and ends early, and where there is none."""

import itertools
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import contents
from helpers.commands import interrupt, interrupted_at, run, shards, tensors_of
from helpers.families import TOKENS
from helpers.pretended_gpu import late_copies, pretended_gpu
from helpers.ranks import on_ranks
from helpers.ranks import prune as prune_on_ranks
from helpers.stacks import small, small_batches
from helpers.verifying import WANDA
from transformers import AutoModelForCausalLM

from sparsefw import InputError, arithmetic, evaluate, prune, verify
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import WindowStream, windows_of
from sparsefw.driver import distill, recovery, saves
from sparsefw.driver.saves import Progress
from sparsefw.estimate import placement
from sparsefw.estimate.memory import MemoryNeeds
from sparsefw.report import log
from sparsefw.report.content import read_report

DEFAULT = ("--method", "sparsefw", "--steps", "1", "--reconstruct", "0")
# Windows of 32 tokens.
FOUR, TWENTY = ("--recover", "128"), ("--recover", "640")
TIMES = ("report.json", "report.html", "README.md", "SHA256SUMS")


@pytest.fixture
def go(pruned, tmp_path, monkeypatch):
    """go(name, *flags) prunes by Wanda; returns the exit status, and the output's folder."""
    source, plain = pruned(*WANDA)
    # Few steps, on models that are made of noise, gain by low rates only.
    monkeypatch.setattr(distill, "RATE", 0.04)

    def go(name, *flags):
        return run(source, plain.parent / "text.txt", tmp_path / name, *WANDA, *flags), tmp_path / name

    return go


def report_of(went):
    status, folder = went
    assert status == 0
    return read_report(folder / "report.json")


def files_of(went):
    """What an output holds, but for times and its name."""
    status, folder = went
    assert status == 0
    assert verify.main([str(folder)]) == 0
    return {name: content for name, content in contents(folder).items() if name not in TIMES}


def change_rates(patch, rate_of):
    """The rate of step n becomes rate_of(n, rate)."""
    step, made = distill._step, itertools.count()

    def changed(*given, **options):
        if "rate" in options:
            options["rate"] = rate_of(next(made), options["rate"])
        return step(*given, **options)

    patch.setattr(distill, "_step", changed)


def divergences(ids, *models):
    """Kullback and Leibler's divergence of each model's predictions from the first model's, of each token."""
    dense, *others = (model(ids).logits.double().log_softmax(-1) for model in models)
    return [(dense.exp() * (dense - x)).sum(-1) for x in others]


@torch.no_grad()
def test_the_report_tells_what_is_gained(go, pruned, capsys):
    source, plain = pruned(*WANDA)
    went = go("out", *TWENTY, "--eval", "default", "--eval-windows", "2")
    report, printed = report_of(went), capsys.readouterr().out
    output, (text,) = went[1], report.evaluation
    stream = WindowStream(load_tokenizer(source), str(plain.parent / "text.txt"), 6, 32, 0)
    # The window after those of the calibration is held out.
    stream.take(6)
    models = [AutoModelForCausalLM.from_pretrained(x, dtype=torch.float64) for x in (source, plain, output)]
    before, after = (x.mean().item() for x in divergences(stream.take(1).ids, *models))
    assert [report.recovery.before, report.recovery.after] == pytest.approx([before, after], rel=1e-4)
    assert after < before
    assert [cells[-1] for _, cells in log.result_rows(report)] == ["", "mask", "mask, recovery"]
    assert (report.recovery.steps, report.recovery.data.windows) == (19, 20)
    card = (output / "README.md").read_text()
    perplexity = f"{text.perplexity['recovered']:.3f}"
    assert f"\n| **recovered** | {perplexity} |" in card
    assert str(plain.parent) not in card
    for name, x in tensors_of(plain).items():
        changed = tensors_of(output)[name]
        assert not changed[x == 0].any()
        assert torch.equal(changed, x) == (x.dim() == 1 or "proj" not in name)
    assert verify.main([str(output)]) == 0
    capsys.readouterr()
    assert evaluate.main([str(output), "--eval", "default", "--eval-windows", "2", "--seqlen", "32"]) == 0
    assert perplexity in capsys.readouterr().out
    assert re.search(rf"^recovered +{perplexity} +mask, recovery$", printed, re.MULTILINE)


@pytest.mark.parametrize("first", [8, 11])
def test_killed_anywhere_it_ends_with_the_same_bytes(first, go, monkeypatch):
    """A state is saved after each step. Each run is killed at a later write than the one before it."""

    def killed():
        raise OSError("killed")

    monkeypatch.setattr(Progress, "is_due", True)
    expected = files_of(go("undisturbed", *FOUR))
    for n in range(first, 99):
        with interrupted_at(n, killed):
            status, folder = went = go("killed", *FOUR)
        if not status:
            break
        assert not folder.exists()
    assert n > first + 3
    assert report_of(went).recovery.steps == 3
    assert files_of(went) == expected


def test_the_best_state_stays_beside_the_last(tmp_path):
    """Here a state is its number of steps."""
    weights = SimpleNamespace(state=lambda: {"x": torch.tensor([progress.done])}, restored=[])
    weights.restore = lambda state, step: weights.restored.append((state["x"].item(), step))
    progress = SimpleNamespace(done=0)
    progress = Progress(tmp_path, saves.Plan(9, 1, 32, ""), [weights], 0.0, print)
    for progress.done, loss in enumerate([3.0, 1.0, 2.0, 4.0], 1):
        progress.save(lambda loss=loss: loss)
    assert [saved.step for saved in saves.begun(tmp_path).states] == [2, 4]
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-2", "step-4"}
    progress.take_best(0.5)
    assert weights.restored == []
    progress.take_best(math.nan)
    assert weights.restored == [(2, 2)]
    assert progress.done == 2


def test_chunks_make_no_difference(go, monkeypatch):
    """Steps of several windows have a larger rate. It falls in the last third."""
    monkeypatch.setattr(distill, "windows_of_step", lambda *given: 3)
    found, rates = [], []
    change_rates(monkeypatch, lambda n, rate: rates.append(rate) or rate)
    for chunk in (1, 4, 99):
        monkeypatch.setattr(distill, "chunk_windows", lambda *given, n=chunk: n)
        found.append(go(str(chunk), *TWENTY))
    assert report_of(found[0]).recovery.steps == 6
    assert files_of(found[0]) == files_of(found[1]) == files_of(found[2])
    assert rates == pytest.approx(3 * [0.04 * math.sqrt(3 / 2) * min(1, 3 - n // 3 / 2) for n in range(18)])


def test_ctrl_c_ends_the_steps_with_the_best_state(go, monkeypatch, capsys):
    """The steps after the saved one go astray."""

    def astray(n, rate):
        return rate if n < 5 else 1e3 if n < 9 else interrupt()

    change_rates(monkeypatch, astray)
    monkeypatch.setattr(Progress, "is_due", property(lambda progress: progress.done == 5))
    found = report_of(go("once", *TWENTY)).recovery
    out = capsys.readouterr().out
    assert "interrupted: the recovery ends here" in out
    assert f"step 5: saved; divergence on held-out windows: {found.after:.4g}\n" in out
    assert found.steps == 5
    assert found.after < found.before
    with monkeypatch.context() as patched:
        change_rates(patched, lambda n, rate: interrupt())
        patched.setattr(Progress, "take_best", lambda *given: interrupt())
        assert go("twice", *TWENTY)[0] == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_another_recovery_or_none_may_end_an_unfinished_run(go, monkeypatch):
    """Nothing stays of the first one, which has written a block."""
    write = Writer.write

    def interrupted(writer, n, *given):
        if n > writer.shards:
            interrupt()
        write(writer, n, *given)

    monkeypatch.setattr(Progress, "is_due", True)
    # A choice of its steps, which a resumed run takes over.
    monkeypatch.setattr(arithmetic, "rounds_products", lambda *given: True)
    for tokens in ("0", "128"):
        with monkeypatch.context() as patched:
            patched.setattr(Writer, "write", interrupted)
            assert go(tokens, *TWENTY)[0] == 130
        found, direct = go(tokens, "--recover", tokens), go(f"direct-{tokens}", "--recover", tokens)
        assert files_of(found) == files_of(direct)
        assert report_of(found).recovery == report_of(direct).recovery
        assert report_of(found).arguments["recover"] == int(tokens)


@pytest.mark.parametrize("gain", [1, -1])
def test_one_that_has_ended_is_not_exchanged(go, monkeypatch, capsys, gain):
    with monkeypatch.context() as patched:
        change_rates(patched, lambda n, rate: gain * rate)
        patched.setattr(Writer, "finish", lambda *given: interrupt())
        assert go("out", *FOUR)[0] == 130
    for flag, value in (("--recover", "0"), ("--hours", "9.5")):
        assert go("out", *FOUR, flag, value)[0] == 2
        assert f"{flag} {value}: the recovery has ended with another value" in capsys.readouterr().err
    found = report_of(go("out", *FOUR))
    assert (found.recovery is None, found.arguments["recover"]) == (gain < 0, 128)


def test_the_report_is_of_the_run_that_ends(pruned, tmp_path, monkeypatch):
    """Its model has moved, and nothing is recovered any more."""
    source, plain = pruned(*WANDA)
    first, out = shutil.copytree(source, tmp_path / "first"), tmp_path / "out"
    flags = (plain.parent / "text.txt", out, *DEFAULT)
    with monkeypatch.context() as patched:
        patched.setattr(distill, "_fit", lambda *given: interrupt())
        assert run(first, *flags) == 130
    second = first.rename(tmp_path / "second")
    monkeypatch.setattr(recovery, "_impossible", lambda run: "too large")
    report = report_of((run(second, *flags), out))
    assert (report.arguments["model"], report.recovery) == (str(second), None)
    assert report.notes == ["no recovery of the whole model: too large"]


def test_where_nothing_is_gained_the_pruned_weights_stay(go, output, monkeypatch, capsys):
    change_rates(monkeypatch, lambda n, rate: -rate)
    report = report_of(went := go("out", *FOUR))
    assert (report.recovery, len(report.notes)) == (None, 1)
    assert shards(went[1]) == shards(output)
    assert "nothing is gained, so the pruned weights stay" in capsys.readouterr().out


def test_hours_end_the_steps_and_choose_their_number(go, monkeypatch, capsys):
    """Here a window takes a second, also one that is held out."""
    step, now = distill._step, [0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])

    def slow(*given, **options):
        now[0] += 1
        return step(*given, **options)

    monkeypatch.setattr(distill, "_step", slow)
    for module in (distill, saves):
        monkeypatch.setattr(module, "time", clock)
    report = report_of(go("at once", *TWENTY, "--hours", "0"))
    assert (report.recovery.steps, report.given["hours"]) == (1, 0)
    assert "0 hours are over: the recovery ends after 1 step\n" in capsys.readouterr().out
    # Ten windows in 21 seconds, as the first one takes a second forward and one more on the way back.
    found = report_of(go("chosen", *DEFAULT, "--hours", str(21 / 3600))).recovery
    assert (found.steps, found.data.windows) == (9, 10)
    # A state is due after each six steps.
    monkeypatch.setattr(saves, "SHARE", 0.2)
    with monkeypatch.context() as patched:
        patched.setattr(saves, "shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=0)))
        assert report_of(go("full", *TWENTY)).recovery.steps == 19
    assert capsys.readouterr().out.count("no state is saved: it takes ") == 3
    monkeypatch.setattr(Progress, "is_due", True)
    # Saving measures the loss, which takes a second after each step.
    assert report_of(go("saved", *TWENTY, "--hours", str(10.5 / 3600))).recovery.steps <= 6
    assert "hours are over: the recovery ends after 6 steps\n" in capsys.readouterr().out


def test_by_default_it_takes_what_fits(go, monkeypatch, capsys):
    assert report_of(go("fits", *DEFAULT)).arguments["recover"] == 4 * 6 * 32
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "is_due", True)
        with interrupted_at(24, lambda: 1 / 0):
            assert go("begun", *DEFAULT)[0]
    monkeypatch.setattr(placement, "recovery_needs", lambda *given: MemoryNeeds({"recover": (0, 2**50)}))
    capsys.readouterr()
    assert report_of(go("none", *DEFAULT)).recovery is None
    _, _, note = capsys.readouterr().out.partition("note: no recovery of the whole model: ")
    assert "this run needs at least 1048576.01 GiB of host memory" in note.splitlines()[0]
    assert go("refused", *FOUR)[0] == 2
    assert capsys.readouterr().err.startswith("sparsefw: --recover 128: --host-memory ")
    # Steps that are made are not dropped where less memory is free.
    assert go("begun", *DEFAULT)[0] == 2


def test_blocks_run_again_where_their_graphs_do_not_fit(go, monkeypatch, capsys):
    expected = files_of(go("graphs", *FOUR))
    assert ", blocks run again" not in capsys.readouterr().out

    def needs(shape, workload, reruns):
        return MemoryNeeds({"recover": (0, 0 if reruns else 2**50)})

    monkeypatch.setattr(placement, "recovery_needs", needs)
    assert files_of(go("reruns", *FOUR)) == expected
    assert "steps of 32 tokens, blocks run again in the backward; divergence" in capsys.readouterr().out


def test_a_default_one_that_fails_leaves_the_pruned_model(go, monkeypatch, capsys):
    """Here at the very end, when all blocks are written."""

    def full(*given):
        raise torch.OutOfMemoryError("full")

    flags = (*DEFAULT, "--eval", "default", "--eval-windows", "1")
    expected = files_of(go("without", *flags, "--recover", "0"))
    monkeypatch.setattr(recovery, "_evaluated", full)
    assert go("asked", *flags, *FOUR)[0] == 1
    capsys.readouterr()
    assert files_of(went := go("default", *flags)) == expected
    assert report_of(went).recovery is None
    # On a GPU the reason names its memory.
    assert "note: no recovery of the whole model: " in capsys.readouterr().out


def without_recovery(ranks, source, output, text):
    config = dict(method="sparsefw", steps=1, reconstruct=0)
    with pytest.raises(InputError, match="recover=128: 2 ranks prune; python"):
        prune_on_ranks(ranks, source, output, text, config | dict(recover=128))
    report, lines = prune_on_ranks(ranks, source, output, text, config)
    return report.recovery, [line for line in lines if line.startswith("note: no recovery of the whole model: 2 ranks")]


def test_where_there_is_none(pruned, tmp_path):
    """Several ranks prune, or a model makes no predictions."""
    source, plain = pruned(*WANDA)
    found = on_ranks(2, without_recovery, source, tmp_path / "ranks", str(plain.parent / "text.txt"))
    assert [(recovery, len(notes)) for recovery, notes in found] == [(None, 1)] * 2
    batches = small_batches((2, 5), (2, 5))
    with pytest.raises(InputError, match="recover=128: Small predicts no tokens"):
        prune(small(), calibration=batches, kernel="torch", recover=128)
    assert prune(small(), calibration=batches, kernel="torch", steps=1).report.recovery is None


@torch.no_grad()
def test_a_model_in_memory_and_batches_with_padding(pruned):
    source, _ = pruned(*WANDA)
    dense, plain, model = (AutoModelForCausalLM.from_pretrained(source).eval() for _ in range(3))
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[:, 17:] = 0
    batches = [{"input_ids": ids[None], "attention_mask": mask} for ids in TOKENS]
    options = dict(calibration=batches, kernel="torch", method="wanda", precision="ieee")
    prune(plain, **options)
    found = prune(model, recover=480, **options).report.recovery
    assert (found.steps, found.data.windows) == (19, 20)
    # The first batch is held out.
    before, after = (x[0, :17].mean().item() for x in divergences(TOKENS[:1], dense.double(), plain, model))
    assert [found.before, found.after] == pytest.approx([before, after], rel=1e-4)
    assert after < before


def test_what_is_held_out_never_comes_again():
    batches = [*windows_of(torch.arange(24).view(6, 4), "tokens").split(1)]
    held_out, others = batches[:2], batches[2:]
    found = distill._learned(itertools.cycle(batches), held_out)
    assert [*itertools.islice(found, 12)] == 3 * others
    with pytest.raises(InputError, match="all windows are like those that are held out; give more text"):
        next(distill._learned(itertools.cycle(held_out), held_out))


def test_a_gpu_gives_the_same(go, monkeypatch):
    flags = ("--recover", "256", "--precision", "ieee")
    went = go("cpu", *flags)
    assert report_of(went).recovery.steps == 7
    pending = late_copies(monkeypatch)
    with pretended_gpu():
        on_gpu = go("gpu", *flags)
    assert not pending
    assert shards(on_gpu[1]) == shards(went[1])
