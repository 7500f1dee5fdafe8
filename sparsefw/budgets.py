"""How the sparsity is shared out over the blocks: the dense model is run once, and its blocks are measured."""

from types import ModuleType

from torch import Tensor

from sparsefw import allocation
from sparsefw.block import capture_block
from sparsefw.methods import Settings
from sparsefw.placement import Placement
from sparsefw.stream import StreamedModel
from sparsefw.windows import Windows

# Per block, what each layer keeps by name: of every row, or in all; see `allocation.whole_budgets`.
Budgets = list[dict[str, int | Tensor]]


def allocate(
    model: StreamedModel,
    calibration: Windows,
    how: str,
    settings: Settings,
    ops: ModuleType,
    placement: Placement,
) -> tuple[list[float], Budgets]:
    """Run the dense model once, and share out the sparsity between its blocks.

    Args:
        model: the streamed model.
        calibration: the windows that blocks are measured on.
        how: "owl" or "error", see `allocation`.
        settings: the run's settings; the pattern has a budget per row or per layer.
        ops: the kernels.
        placement: of activations.

    Returns:
        The sparsity of every block, and what its layers keep.
    """
    pattern = settings.pattern
    stream = model.start(calibration.ids, placement.batch, placement.room(model.device))
    names, shapes, found = [], [], []
    for i in range(len(model.blocks)):
        model.open(i)
        layers, grams, _ = capture_block(model, i, stream, range(len(stream.hidden)), settings, ops)
        names.append([layer.name for layer in layers])
        shapes.append([tuple(layer.weight.shape) for layer in layers])
        matrices = [(layer.weight, grams[layer.gram]) for layer in layers]
        found.append(allocation.measure(how, matrices, pattern.sparsity, ops))
        model.advance(i, stream)
        model.close(i)
    sizes = [sum(rows * d for rows, d in block) for block in shapes]
    sparsities = allocation.share_out(how, found, sizes, pattern.sparsity)
    kept = allocation.whole_budgets(sparsities, shapes, pattern.sparsity, pattern.scope)
    return [float(s) for s in sparsities], [dict(zip(n, k, strict=True)) for n, k in zip(names, kept, strict=True)]
