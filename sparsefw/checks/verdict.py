"""What the checks of a written checkpoint found, and how it is told."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

# Failures of one check that are listed; the others are counted.
LISTED = 10


@dataclass
class Check:
    """One line of the verdict.

    Attributes:
        what: is checked.
        unit: of what is counted.
        count: how many were looked at.
        failures: one line each, which begins with the culprit's name.
        skipped: why it was not made; empty where it was.
    """

    what: str
    unit: str = "tensors"
    count: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def fail(self, name: str, why: str) -> None:
        """Add a failure."""
        self.failures.append(f"{name}: {why}")


@dataclass
class Verdict:
    """What the checks found.

    Attributes:
        checks: by name, in the order in which they are shown.
        zeros: by type of layer: layers, weights, zeros among them.
        notes: what the user should know beside.
        not_compared: why there is no source to compare with; empty where there is.
    """

    checks: dict[str, Check]
    zeros: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
    notes: list[str] = field(default_factory=list)
    not_compared: str = ""

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, check in self.checks.items() if check.failures]

    def skip(self, why: str, *names: str) -> None:
        """Give up checks."""
        for name in names:
            self.checks[name].skipped = self.checks[name].skipped or why


def lines(verdict: Verdict) -> Iterator[str]:
    """The verdict in words: a row for each check with its failures, one for each type of layer, a conclusion."""
    yield f"{'check':8} {'what':56} {'count':>16}  verdict"
    for name, check in verdict.checks.items():
        said = f"FAILED ({len(check.failures)})" if check.failures else "ok"
        if check.skipped and not check.failures:
            said = f"not checked: {check.skipped}"
        yield f"{name:8} {check.what:56} {check.count:>7} {check.unit:8}  {said}"
        yield from (f"  {failure}" for failure in check.failures[:LISTED])
        if len(check.failures) > LISTED:
            yield f"  and {len(check.failures) - LISTED} more"
    if verdict.zeros:
        yield ""
        yield f"{'layers':56} {'count':>7} {'weights':>14} {'zeros':>14} {'sparsity':>9}"
        total = [sum(column) for column in zip(*verdict.zeros.values(), strict=True)]
        for kind, (count, weights, zeros) in [*verdict.zeros.items(), ("all", total)]:
            yield f"{kind:56} {count:>7} {weights:>14} {zeros:>14} {100 * zeros / weights:>7.2f} %"
    yield ""
    yield from (f"note: {note}" for note in verdict.notes)
    if verdict.not_compared:
        yield f"not compared with the source: {verdict.not_compared}"
    made = "all checks that could be made" if verdict.not_compared else "all checks"
    yield f"failed: {', '.join(verdict.failed)}" if verdict.failed else f"{made} passed"
