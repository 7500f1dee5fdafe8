"""Find the layers of a block, and their stages, by one micro-batch through it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sparsefw.model.layers.names import Layer, kind_of
from sparsefw.model.layers.stage import Stage
from sparsefw.model.layers.watch import Selector, Watch, everything


@dataclass(frozen=True)
class Survey:
    """The layers of a block, as one micro-batch shows them.

    Attributes:
        layers: the selected layers, in the order of use.
        ending: names of the layers whose output is the block's.
    """

    layers: list[Layer]
    ending: frozenset[str]


def survey(block: nn.Module, run: Callable[[], object], selected: Selector = everything) -> Survey:
    """Look at the layers of a block.

    Args:
        block: the block, on its device.
        run: runs one micro-batch through it, and returns the block's output.
        selected: selects the layers to look at.
    """
    watch, outputs = Watch(block, selected, record_outputs=True), []
    watch.through(lambda: outputs.append(run()))
    ending = frozenset(name for name in watch.layers if watch.outputs.is_output(outputs[0], name))
    return Survey(list(watch.layers.values()), ending)


def find_layers(block: nn.Module, run: Callable[[], object], selected: Selector = everything) -> list[Layer]:
    """The layers of a block in the order of use; for the arguments see `survey`."""
    watch = Watch(block, selected)
    watch.through(run)
    return list(watch.layers.values())


def stages(block: nn.Module, run: Callable[[], object], selected: Selector = everything) -> list[Stage]:
    """The stages of a block in the order of use; for the arguments see `survey`."""
    surveyed = survey(block, run, selected)
    by_key: dict[str, list[Layer]] = {}
    for layer in surveyed.layers:
        by_key.setdefault(kind_of(layer.gram), []).append(layer)
    final = len(by_key) - 1
    names = [[layer.name for layer in layers] for layers in by_key.values()]
    moving = final - dense_moves_early(names, surveyed.ending)
    return [
        Stage(key, layers[-1].name if key == layers[0].gram else None, n == final, n == moving)
        for n, (key, layers) in enumerate(by_key.items())
    ]


def dense_moves_early(layers_by_stage: list[list[str]], ending: frozenset[str]) -> bool:
    """Whether the dense model's micro-batches move on to the next block one stage before the last, see `Stage`.

    Args:
        layers_by_stage: names of the layers of each stage.
        ending: names of the layers whose output is the block's.
    """
    return len(layers_by_stage) > 1 and ending.issuperset(layers_by_stage[-1])
