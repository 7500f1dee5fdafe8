"""The last block is fitted to predictions: as the plan says, if the data allow it, and the same on all ranks."""

import pytest
from helpers.commands import make_place
from helpers.families import first_is_fast
from helpers.ranks import on_ranks, prune
from helpers.reconstructed import SEQLEN, WINDOWS, run

from sparsefw.checkpoint.source import inspect
from sparsefw.driver import reconstruct
from sparsefw.driver.reconstruct import BlockFit
from sparsefw.estimate import steps as steps_of
from sparsefw.estimate.profile import shape_of
from sparsefw.model.activations import split_batches
from sparsefw.report.content import HIDDEN, PREDICTIONS

pytestmark = pytest.mark.usefixtures("constants")

FLAGS = ["--method", "wanda", "--reconstruct", "2"]


class Watched:
    """What is seen of reconstructions.

    Attributes:
        fits: the blocks that are fitted.
        asked: for each time that the data are asked whether they show predictions, their answer.
        beside_head: numbers of the blocks that are fitted while the embeddings are in memory.
    """

    def __init__(self, patch, answer=None):
        self.fits, self.asked, self.beside_head = [], [], []
        make_round, predicts = BlockFit.round, reconstruct.logits_are_tokenwise

        def watched_round(fit, *args):
            self.fits.append(fit)
            if not fit.run.model.model.get_input_embeddings().weight.is_meta:
                self.beside_head.append(fit.number)
            return make_round(fit, *args)

        def watched_predicts(*args):
            self.asked.append(predicts(*args) if answer is None else answer)
            return self.asked[-1]

        patch.setattr(BlockFit, "round", watched_round)
        patch.setattr(reconstruct, "logits_are_tokenwise", watched_predicts)
        # More steps where there are predictions.
        patch.setattr(steps_of, "MIN_TOKENS", SEQLEN // steps_of.EVERY)


@pytest.mark.parametrize(
    ("family", "changes", "predicts"),
    # Behind the last block of the second more is read than its hidden states.
    first_is_fast([("llama", {"num_hidden_layers": 2}, True), ("gemma4_text", {}, False)]),
)
def test_a_run_predicts_where_its_plan_does(family, changes, predicts, tmp_path, monkeypatch):
    folder, seen = make_place(tmp_path, family, **changes), Watched(monkeypatch)
    report, _ = run(folder, tmp_path / "out", *FLAGS)
    shape, steps = shape_of(inspect(folder / "model")), 2 * len(split_batches(WINDOWS)[0])
    planned = [*[steps] * (len(shape.blocks) - 1), (steps_of.TIMES if predicts else 1) * steps]
    assert [block.reconstruction.steps for block in report.blocks] == planned
    assert report.blocks[-1].reconstruction.loss == (PREDICTIONS if predicts else HIDDEN)
    assert shape.blocks[-1].predicts is predicts
    # Nothing is read for models that predict nothing: no plan counts it.
    assert seen.asked == [True] * predicts
    assert seen.beside_head == [len(planned) - 1] * predicts


def test_data_that_show_no_predictions_let_the_head_go(llama, out, monkeypatch):
    seen = Watched(monkeypatch, answer=False)
    report, _ = run(llama, out, *FLAGS)
    assert [block.reconstruction.loss for block in report.blocks] == [HIDDEN] * 2
    assert seen.asked == [False]
    assert [fit.number for fit in seen.fits] == [0, 1]
    assert not seen.beside_head


def fitted_to(ranks, answers, folder, output):
    """What this rank fits each block to, where the windows of ranks answer this."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Watched(patch, answers[ranks.number])
        prune(ranks, folder / "model", output, folder / "text.txt", {"method": "wanda", "reconstruct": 2})
    return [PREDICTIONS if fit.tokens else HIDDEN for fit in seen.fits]


@pytest.mark.parametrize("answers", [(True, False), pytest.param((True, True), marks=pytest.mark.slow)], ids=str)
def test_ranks_agree_on_what_the_last_block_is_fitted_to(answers, llama, out):
    """Otherwise they would make different numbers of steps, and wait for each other."""
    last = PREDICTIONS if all(answers) else HIDDEN
    assert on_ranks(2, fitted_to, answers, llama, out) == [[HIDDEN, last]] * 2
