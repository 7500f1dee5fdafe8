"""Stages: the layers that are pruned together, and the part of the block that each stage runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsefw.model.layers.names import Layer
from sparsefw.model.parts import INPUT, Point


@dataclass(frozen=True)
class Write:
    """The stream before and behind a layer that writes to it.

    Attributes:
        stream: the stream before it.
        sum: the stream behind it; None: it is the block's output.
    """

    stream: Point
    sum: Point | None


@dataclass(frozen=True)
class Role:
    """A layer's part in its block. It says how the layer's cross matrix is measured, see `measure`.

    Attributes:
        segment: number of the cuts before the layer, see `dataflow`.
        input: the point of its input; None: outputs in both models have to be recorded, since the input is not known,
            or its product goes into other sums than the residual stream.
        write: where it adds its product to the stream, and is measured from the streams of both models. Other layers
            with an input are measured from the inputs.
        keepable: whether the block can go on from the input and the last cut, and saves layers by that.
    """

    segment: int = 0
    input: Point | None = None
    write: Write | None = None
    keepable: bool = False


# The role of a layer in a block that has to be run as a whole.
UNKNOWN_ROLE = Role()


def is_watched(roles: Sequence[Role]) -> bool:
    """Whether a stage has to be watched: the point of its input, or of an output, is not known."""
    return any(role.input is None for role in roles)


@dataclass(frozen=True)
class Stage:
    """Layers that read one input. They are pruned before the inputs of later layers are measured.

    The same layers of all experts are one stage, too.

    Attributes:
        key: name of their Gram matrix, without an expert's index.
        last: name of the layer that a micro-batch uses last; None for experts, where any may be the last.
        final: whether no stage follows.
        start: the cut that the stage's runs begin at, or the block's input.
        behind: the cut at which the runs of the next stage begin, if it is a later one. The dense model's micro-batches
            move on to it in this stage, and in the final stage to the end of the block.
        input: the point of the layers' input; None: the stage is watched.
        keepable: whether the pruned model's next run can begin at the input.
        layers: the layers, if the stage is not watched. A micro-batch may show others, if they are experts.
        writes: the layers that write to the stream.
    """

    key: str
    last: str | None
    final: bool = False
    start: Point = INPUT
    behind: Point | None = None
    input: Point | None = None
    keepable: bool = False
    layers: tuple[Layer, ...] = field(default=(), compare=False)
    writes: dict[str, Write] = field(default_factory=dict, compare=False)
