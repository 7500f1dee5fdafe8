"""Layers by type: the name inside their block, the same for all blocks and all experts."""

import re
from collections import Counter, defaultdict

from sparsefw.report.content import Report

# A slice of a stacked parameter, or the position in a list of modules.
_EXPERT = re.compile(r"(?<![^.\[])\d+(?![^.\]])")


def positions_of(report: Report) -> dict[str, int]:
    """The position of every block by its name."""
    return {block.name: i for i, block in enumerate(report.blocks)}


def locate(name: str, positions: dict[str, int]) -> tuple[int, str]:
    """The position of a tensor's block, and the tensor's type: its name inside the block, `*` for an expert's number.

    Args:
        name: name of the tensor.
        positions: positions of the blocks, see `positions_of`.

    Raises:
        ValueError: the tensor lies in none of the blocks.
    """
    for dot in re.finditer(r"\.", name):
        if (prefix := name[: dot.start()]) in positions:
            return positions[prefix], _EXPERT.sub("*", name[dot.end() :].removesuffix(".weight"))
    raise ValueError(f"{name}: in none of the blocks")


def kept_dense(report: Report) -> list[tuple[str, str, str]]:
    """The types of the matrices that were not pruned: type, how many, and in which blocks.

    Those in blocks that text does not run through are types of their own, named in full.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    positions, idle = positions_of(report), Counter[str]()
    for name in report.kept_dense:
        try:
            position, kind = locate(name, positions)
        except ValueError:
            idle[_EXPERT.sub("*", name.removesuffix(".weight"))] += 1
            continue
        numbers[kind].append(report.blocks[position].block)
    rows = [(kind, f"{len(blocks):,}", _ranges(blocks)) for kind, blocks in numbers.items()]
    return rows + [(kind, f"{count:,}", "text does not run through them") for kind, count in idle.items()]


def _ranges(numbers: list[int]) -> str:
    """Whole numbers in ascending order, with runs of three or more abridged: "0 to 3, 7, 8"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
