"""States of a recovery on the disk, from which it goes on after a kill with the same bits.

    state.json               the plan of the steps, and the states that are there
    step-N/00001.safetensors the optimizer's state of the first block after N steps

A state is saved at intervals in which saving takes 2 % of the time at most. The last state stays, and the one with the
lowest loss on held-out windows.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from sparsefw.checkpoint.files import durably, parse
from sparsefw.errors import Say
from sparsefw.memory import gib
from sparsefw.solver.kept_weights import KeptWeights

# Largest share of the time that saving takes. Bytes a second that a disk is expected to write before the first save.
SHARE, EXPECTED = 0.02, 5e8

# The state's file is small, however long the recovery is.
MAX_BYTES = 2**20


@dataclass(frozen=True)
class Plan:
    """The steps of a recovery.

    Attributes:
        steps: number of steps.
        of_step: number of windows in a step.
        seqlen: tokens in a window.
        hash: SHA-256 of the held-out windows, in hex.
        hours: hours for all steps; None: no limit.
    """

    steps: int
    of_step: int
    seqlen: int
    hash: str
    hours: float | None = None


@dataclass(frozen=True)
class Saved:
    """A saved state: its number of steps, its loss on held-out windows, and the seconds that its steps took."""

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Saves:
    """The content of state.json."""

    plan: Plan
    states: list[Saved] = field(default_factory=list)


def begun(folder: Path) -> Saves | None:
    """Read what an unfinished recovery has saved; None: it has saved nothing.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "state.json"
    return parse(Saves, path, MAX_BYTES) if path.exists() else None


class Progress:
    """The steps of a recovery so far, and their states on the disk.

    Args:
        folder: folder of the states.
        plan: the plan of the steps. States of another plan are deleted.
        weights: the optimizers of the blocks.
        seconds: seconds that the loss on held-out windows takes.
        say: called with every line of the log.

    Attributes:
        done: number of steps so far.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        weights: Sequence[KeptWeights],
        seconds: float,
        say: Say,
    ) -> None:
        self._folder, self._weights, self._say = folder, weights, say
        self._bytes = sum(x.nbytes for of_block in weights for x in of_block.state().values())
        self._cost, self.done = seconds + self._bytes / EXPECTED, 0
        self._saves = begun(folder) or Saves(plan)
        if self._saves.plan != plan:
            say("the steps of the recovery begin again: their number, hours, text or length of windows has changed")
            self._saves = Saves(plan)
        self._keep(self._saves.states)
        self._before = 0.0
        if self._saves.states:
            self._restore(self._saves.states[-1])
            self._before = self._saves.states[-1].seconds
        self._started = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds that all steps so far took, with those before a kill."""
        return self._before + time.perf_counter() - self._started

    @property
    def is_due(self) -> bool:
        """Tell whether it is time to save a state."""
        return time.perf_counter() - self._last > self._cost / SHARE

    def save(self, loss: Callable[[], float]) -> None:
        """Save the present state with its loss."""
        began = self._last = time.perf_counter()
        if shutil.disk_usage(self._folder).free < 2 * self._bytes:
            self._say(f"no state is saved: it takes {gib(self._bytes)} GiB of the disk; a kill would lose these steps")
            return
        folder = self._path(self.done)
        folder.mkdir(exist_ok=True)
        for n, weights in enumerate(self._weights, 1):
            tensors = {name: x.cpu() for name, x in weights.state().items()}
            durably(folder / f"{n:05d}.safetensors", partial(save_file, tensors))
        saved = Saved(self.done, loss(), self.seconds)
        self._say(f"step {self.done}: saved; divergence on held-out windows: {saved.loss:.4g}")
        best = min([*self._saves.states, saved], key=lambda x: x.loss)
        self._keep([best, saved] if best != saved else [saved])
        self._last = time.perf_counter()
        self._cost = self._last - began

    def take_best(self, loss: float) -> None:
        """Go back to the saved state with the lowest loss, if its loss is below the present one."""
        best = min(self._saves.states, key=lambda x: x.loss, default=None)
        # The present loss may be NaN.
        if best and not loss <= best.loss:
            self._restore(best)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def _keep(self, states: list[Saved]) -> None:
        """Keep these states, and delete all others."""
        self._saves = Saves(self._saves.plan, states)
        durably(self._folder / "state.json", json.dumps(asdict(self._saves)))
        for path in {*self._folder.glob("step-*")} - {self._path(saved.step) for saved in states}:
            shutil.rmtree(path)

    def _restore(self, saved: Saved) -> None:
        for n, weights in enumerate(self._weights, 1):
            weights.restore(load_file(self._path(saved.step) / f"{n:05d}.safetensors"), saved.step)
        self.done = saved.step
