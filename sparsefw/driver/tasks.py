"""The tasks of a run: their requests go through the dense and every pruned block with the windows of texts."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsefw.data import Tokenizer
from sparsefw.evaluation.encoding import ROLLING, Answer, Encoded, encoder
from sparsefw.evaluation.job import DRAWS, Tasks
from sparsefw.evaluation.measured import task_records
from sparsefw.evaluation.packing import row_sizes
from sparsefw.evaluation.request import Score
from sparsefw.evaluation.room import Room
from sparsefw.evaluation.shares import gathered, shares_of
from sparsefw.evaluation.sharing import Allowed, allowed_by
from sparsefw.evaluation.streaming import Packed, RequestStates, embed_requests, embedded
from sparsefw.inputs import Inputs
from sparsefw.model import BlockModel, Placement, StreamedModel, read_config
from sparsefw.ranks import Ranks
from sparsefw.report import TaskRecord
from sparsefw.report.tasks import DENSE, Measurement

if TYPE_CHECKING:
    from sparsefw.checkpoint import Checkpoint
    from sparsefw.evaluation.harness import Questions


@dataclass(frozen=True)
class Asked:
    """What tasks ask.

    Attributes:
        questions: the questions of the tasks; None on all ranks but the first, which alone needs the tasks.
        encoded: the questions as requests.
    """

    questions: "Questions | None"
    encoded: Encoded

    def records(self, scores: dict[str, list[Score]]) -> list[TaskRecord]:
        """The metrics of all tasks, from all scores by "dense" and by method. Rank 0 calls it.

        A model with a score that is NaN has no metrics but NaN: a comparison with it would choose any answer.
        """
        from sparsefw import evaluation

        assert self.questions is not None
        useless = {name for name, of_model in scores.items() if any(math.isnan(x.loglikelihood) for x in of_model)}
        found = {
            name: evaluation.results(self.questions, self.encoded.answers(_numbers(of_model)), DRAWS)
            for name, of_model in scores.items()
        }
        return [_without(record, useless) for record in task_records(found, DENSE)]


def _numbers(scores: list[Score]) -> list[Score]:
    """Scores of which none is NaN: metrics are made of them all the same."""
    return [x._replace(loglikelihood=0.0) if math.isnan(x.loglikelihood) else x for x in scores]


def _without(record: TaskRecord, useless: set[str]) -> TaskRecord:
    """A metric without the values of models that are of no use, and without the differences from such a model."""
    results = record.results
    if DENSE in useless:
        results = {name: replace(found, difference=None) for name, found in results.items()}
    return replace(record, results=results | {name: Measurement(math.nan) for name in results if name in useless})


@dataclass(frozen=True)
class TaskSamples:
    """Requests of tasks as samples of a run, see `loop.Samples`.

    Attributes:
        asked: the requests.
        allowed: what the model allows rows of them.
        seqlen: tokens in a window of the run.
    """

    asked: Asked
    allowed: Allowed
    seqlen: int

    @property
    def line(self) -> str:
        """The line of the log on what is asked."""
        requests = self.asked.encoded.requests
        return f"tasks: {len(self.asked.encoded.questions)} questions, {len(requests)} requests"

    @property
    def sizes(self) -> tuple[tuple[tuple[int, int, bool], ...], int]:
        """Rows of all requests as `Workload` has them, and the number of positions at which a token is predicted."""
        requests = self.asked.encoded.requests
        return row_sizes(self.allowed.pack(requests)), sum(len(request.targets) for request in requests)

    def embed(self, model: BlockModel, placement: Placement, ranks: Ranks) -> RequestStates:
        """The hidden states of this rank's requests before the first block.

        Args:
            model: the model, inside `StreamedModel.outside`.
            placement: what is held at once, and where.
            ranks: the ranks.
        """
        requests = self.asked.encoded.requests
        mine = [requests[n] for n in shares_of(requests, ranks)[ranks.number]]
        room = Room(placement.batch * self.seqlen, placement.place, placement.folder, placement.ahead)
        return embed_requests(model, Packed(mine, self.allowed.pack(mine), self.allowed.sharing), room)

    def scores(self, states: RequestStates, ranks: Ranks) -> list[Score]:
        """The answers to all requests, behind the last block."""
        return gathered(states.scores(), self.asked.encoded.requests, ranks)


def task_samples(asked: Asked, model: StreamedModel, seqlen: int) -> TaskSamples:
    """Samples of a run on a model.

    Raises:
        InputError: weights outside of the blocks hold NaN or Inf, or the model cannot read a token.
    """
    requests = asked.encoded.requests
    with embedded(model, requests):
        return TaskSamples(asked, allowed_by(model, requests), seqlen)


def questions_of(inputs: Inputs) -> "Questions | None":
    """The questions of a run's tasks; None without tasks.

    Raises:
        InputError: as `Tasks.questions` and `evaluation.results`.
    """
    found = Tasks(inputs.tasks, inputs.limit, inputs.num_fewshot, inputs.include_path).questions()
    if found:
        from sparsefw import evaluation

        # A task whose metrics fail would end the run when all blocks are pruned.
        made_up: list[Answer] = [
            -float(n) if question.kind == ROLLING else (-float(n), False) for n, question in enumerate(found.asked, 1)
        ]
        evaluation.results(found, made_up)
    return found


def encoded_questions(questions: "Questions", source: "Checkpoint", tokenizer: Tokenizer) -> Encoded:
    """Questions as requests for a checkpoint.

    Raises:
        InputError: as `Encoder.encode`.
    """
    return encoder(tokenizer, read_config(source)).encode(questions.asked)
