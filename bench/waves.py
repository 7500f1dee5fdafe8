"""How full the waves of the product's tiles are with the chunks that a run takes on a GPU: `python bench/waves.py`.

A wave is a tile on every multiprocessor of an H100. For each stage of Llama models, by default and with two limits of
GPU memory, the table has the heights of the chunks and the share of their waves that tiles of the output fill: for the
highest chunks that fit, and for those that `sparsefw.solver.chunks.wave_rows` takes.
"""

from collections.abc import Iterator

from sparsefw.errors import InputError
from sparsefw.estimate.memory import GIB
from sparsefw.estimate.passes import stages
from sparsefw.estimate.placing import place
from sparsefw.estimate.solve_flops import MULTIPROCESSORS
from sparsefw.estimate.workload import Workload
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.solver import PruneConfig
from sparsefw.solver.chunks import BYTES_PER_ENTRY, ROW_UNIT, TILE, wave_rows, waves

# Width, intermediate width and blocks.
MODELS = {"8B": (4096, 14336, 32), "70B": (8192, 28672, 80), "405B": (16384, 53248, 126)}
LIMITS, HOST = (16, 80), 1024
VOCABULARY, KEYS = 128256, 1024


def llama(hidden: int, intermediate: int, depth: int) -> ModelShape:
    """The shape of a Llama 3 in bf16."""
    layers = (
        LayerShape("q", hidden, hidden, "q"),
        LayerShape("k", KEYS, hidden, "q"),
        LayerShape("v", KEYS, hidden, "q"),
        LayerShape("o", hidden, hidden, "o"),
        LayerShape("gate", intermediate, hidden, "gate"),
        LayerShape("up", intermediate, hidden, "gate"),
        LayerShape("down", hidden, intermediate, "down"),
    )
    size = sum(layer.rows * layer.d for layer in layers)
    outside = 2 * VOCABULARY * hidden
    block = BlockShape(2 * size, layers)
    return ModelShape((block,) * depth, 2 * outside, hidden, VOCABULARY, 0, 2, depth * size + outside)


def share(rows: int, d: int, height: int) -> float:
    """Share of the waves that the output's entries fill."""
    return rows * d / (waves(rows, d, height, MULTIPROCESSORS) * MULTIPROCESSORS * TILE[0] * TILE[1])


def heights(rows: int, height: int) -> str:
    """Chunks of a height as text: number x rows, and the rest."""
    chunks, rest = divmod(rows, height)
    return f"{chunks} x {height}" + (f" + {rest}" if rest else "")


def table() -> Iterator[str]:
    """Lines of the table, in Markdown."""
    yield "| model | GPU memory, GiB | layers | d | highest chunks | filled | chunks | filled |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, sizes in MODELS.items():
        shape = llama(*sizes)
        for limit in LIMITS:
            workload = Workload(256, (), 2048, PruneConfig(), gpu=True, threads=1)
            try:
                placement, _ = place(shape, workload, {"gpu": limit * GIB, "host": HOST * GIB})
            except InputError:
                yield f"| {name} | {limit} | does not fit |"
                continue
            for stage in stages(shape.blocks[0].layers):
                d, rows = stage[0].d, -(-sum(layer.rows for layer in stage) // ROW_UNIT) * ROW_UNIT
                highest = min(rows, placement.solver // (BYTES_PER_ENTRY * d * ROW_UNIT) * ROW_UNIT)
                chosen = wave_rows(rows, d, highest, MULTIPROCESSORS)
                row = [name, limit, ", ".join(layer.name for layer in stage), d]
                for height in (highest, chosen):
                    row += [heights(rows, height), f"{share(rows, d, height):.1%}"]
                yield f"| {' | '.join(map(str, row))} |"


if __name__ == "__main__":
    print(*table(), sep="\n")
