"""The findings of the checks of a written checkpoint, and how they are printed."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

# Failures of one check that are listed; the others are counted.
LISTED = 10


@dataclass
class Check:
    """One line of the verdict.

    Attributes:
        title: what is checked, in words.
        unit: what `count` counts, in the plural.
        count: number of units checked.
        failures: one line for each failure, which begins with the culprit's name.
        skipped: why the check was not made; empty if it was.
    """

    title: str
    unit: str = "tensors"
    count: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def fail(self, name: str, why: str) -> None:
        """Add a failure."""
        self.failures.append(f"{name}: {why}")

    def part(self) -> "Check":
        """The same check before it is made, for a part of what is checked."""
        return replace(self, count=0, failures=[])

    def add(self, part: "Check") -> None:
        """Add the findings of a part."""
        self.count += part.count
        self.failures += part.failures


@dataclass
class Zeros:
    """Zeros in the layers of one type.

    Attributes:
        layers: number of layers.
        weights: number of their weights.
        zeros: number of weights that are zero.
    """

    layers: int = 0
    weights: int = 0
    zeros: int = 0

    def add(self, other: "Zeros") -> None:
        """Add the counts of other layers."""
        self.layers += other.layers
        self.weights += other.weights
        self.zeros += other.zeros


@dataclass
class Verdict:
    """The findings of all checks.

    Attributes:
        checks: by name, in the order in which they are printed.
        zeros: counts of zeros by type of layer.
        notes: what else the user should know, one line each.
        not_compared: why there is no source to compare with; empty if there is one.
        digest: SHA-256 of SHA256SUMS; empty if there is none.
    """

    checks: dict[str, Check]
    zeros: dict[str, Zeros] = field(default_factory=lambda: defaultdict(Zeros))
    notes: list[str] = field(default_factory=list)
    not_compared: str = ""
    digest: str = ""

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, check in self.checks.items() if check.failures]

    def skip(self, why: str, *names: str) -> None:
        """Skip checks; a check that was skipped before keeps its reason."""
        for name in names:
            self.checks[name].skipped = self.checks[name].skipped or why

    def part(self) -> "Verdict":
        """The same checks before they are made, for a part of what is checked."""
        return Verdict({name: check.part() for name, check in self.checks.items()})

    def add(self, part: "Verdict") -> None:
        """Add counts, failures and zeros of a part."""
        for name, check in part.checks.items():
            self.checks[name].add(check)
        for kind, zeros in part.zeros.items():
            self.zeros[kind].add(zeros)


def lines(verdict: Verdict) -> Iterator[str]:
    """The verdict in words: a row for each check with its failures, a row for each type of layer, a conclusion."""
    yield f"{'check':8} {'what':56} {'count':>16}  verdict"
    for name, check in verdict.checks.items():
        yield from _check_lines(name, check)
    if verdict.zeros:
        yield ""
        yield f"{'layers':56} {'count':>7} {'weights':>14} {'zeros':>14} {'sparsity':>9}"
        total = Zeros()
        for zeros in verdict.zeros.values():
            total.add(zeros)
        for kind, zeros in [*verdict.zeros.items(), ("all", total)]:
            percent = 100 * zeros.zeros / zeros.weights
            yield f"{kind:56} {zeros.layers:>7} {zeros.weights:>14} {zeros.zeros:>14} {percent:>7.2f} %"
    yield ""
    yield from (f"note: {note}" for note in verdict.notes)
    if verdict.digest:
        yield f"SHA-256 of SHA256SUMS: {verdict.digest}"
    if verdict.not_compared:
        yield f"not compared with the source: {verdict.not_compared}"
    passed = "all checks that could be made" if verdict.not_compared else "all checks"
    yield f"failed: {', '.join(verdict.failed)}" if verdict.failed else f"{passed} passed"


def _check_lines(name: str, check: Check) -> Iterator[str]:
    outcome = f"FAILED ({len(check.failures)})" if check.failures else "ok"
    if check.skipped and not check.failures:
        outcome = f"not checked: {check.skipped}"
    yield f"{name:8} {check.title:56} {check.count:>7} {check.unit:8}  {outcome}"
    yield from (f"  {failure}" for failure in check.failures[:LISTED])
    if len(check.failures) > LISTED:
        yield f"  and {len(check.failures) - LISTED} more"
