"""The tasks of a run: their requests go through the dense and every pruned block with the windows of texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsefw.data import Tokenizer
from sparsefw.evaluation.encoding import Encoded, encoder
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
from sparsefw.report.tasks import DENSE

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
        """The metrics of all tasks, from all scores by "dense" and by method. Rank 0 calls it."""
        from sparsefw import evaluation

        assert self.questions is not None
        found = {
            name: evaluation.results(self.questions, self.encoded.answers(of_model), DRAWS)
            for name, of_model in scores.items()
        }
        return task_records(found, DENSE)


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

    def scores(self, states: RequestStates, ranks: Ranks, name: str) -> list[Score]:
        """The answers to all requests, behind the last block.

        Args:
            states: the hidden states, which are gone then.
            ranks: the ranks.
            name: "dense", or the method.

        Raises:
            InputError: as `gathered`.
        """
        model = "--tasks, of the dense model" if name == DENSE else f"--tasks, of the model by {name}"
        return gathered(states.scores(), self.asked.encoded.requests, ranks, model, self.allowed.dtype)


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
        InputError: as `Tasks.questions`.
    """
    return Tasks(inputs.tasks, inputs.limit, inputs.num_fewshot, inputs.include_path).questions()


def encoded_questions(questions: "Questions", source: "Checkpoint", tokenizer: Tokenizer) -> Encoded:
    """Questions as requests for a checkpoint.

    Raises:
        InputError: as `Encoder.encode`.
    """
    return encoder(tokenizer, read_config(source)).encode(questions.asked)
