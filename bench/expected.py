"""Compute the share of the roof that each operation should reach on three GPUs: expected, never measured.

The model has a few lower bounds of the time, from the code in results/compiled.json and from data sheets. The largest
bound is the expected time, and its name is the limit. A share that is far lower has a cause outside of the model: bank
conflicts, barriers, clocks that fall, caches that miss, or the start of a launch.

    bytes          the bytes of `cost`, at the rate of a copy
    instructions   a multiprocessor issues 4 instructions of warps in a clock, and 2 of them to the pipe ALU
    latency        a program waits for memory, gets its bytes at its multiprocessor's share of the rate, and its
                   instructions are issued; as many programs as fit a multiprocessor do so at a time (Little's law)
    waves          whole tiles, at the rate of the library's products, while some multiprocessors have no tile
    cache          the operands of all tiles, from the L2 cache

In truth a program gets more than its share of the memory's rate while others compute. So "latency" may be too long by
up to its last term, where only one program fits a multiprocessor.

`python bench/expected.py` makes results/expected.json, and prints it as a table. It compiles nothing.
"""

import json
import re
from math import ceil

from compiled import EXPECTED, RESULTS, SIZE, Operation, committed, launches
from report import markdown

from sparsefw.kernels.launch import triangle_tiles
from sparsefw.kernels.operation import Cost

FILE = RESULTS.with_name("expected.json")

# Data sheets give these: multiprocessors, clock in GHz, memory in GB/s, products in Tflop/s, and KiB of shared memory
# and threads of a multiprocessor. `cache`, bytes of L2 in a clock, is 5120 in NVIDIA's paper on the A100; the same is
# assumed for the H100, and half of it for the RTX 4090. `library` is assumed: the share of its peak that cuBLAS
# reaches.
COLUMNS = ("gpu", "count", "clock", "memory", "bf16", "tf32", "ieee", "shared", "threads", "cache", "library")
GPUS = {
    target: dict(zip(COLUMNS, values, strict=True))
    for target, *values in (
        ("sm_80", "A100 SXM 80 GB", 108, 1.41, 2039, 312, 156, 19.5, 164, 2048, 5120, 0.85),
        ("sm_89", "RTX 4090", 128, 2.52, 1008, 165.2, 82.6, 82.6, 100, 1536, 2560, 0.95),
        ("sm_90", "H100 SXM", 132, 1.83, 3350, 989.4, 494.7, 66.9, 228, 2048, 5120, 0.72),
    )
}
# Assumed: the share of the memory's bandwidth that a copy reaches, and of the cache's that tiles reach, and the seconds
# until a load returns from a busy memory. Of topk.py: passes of a search after its first count, from a threshold and
# from the range of the keys.
ASSUMED = dict(copied=0.92, cached=0.8, latency=7e-7, search=4, range=8)
# Parts of a kernel in the order of its code: before its loops, and each loop. Others have no loops.
PARTS = {
    "adam_step": "index",
    "lmo": "once range chunk",
    "lmo 2:4": "once chunk",
    "packed_product": "once chunk",
    "row_step": "index search",
    "row_step 2:4": "once chunk chunk",
    "row_swaps": "once chunk swap sweep sweep sweep",
    "row_swaps 2:4": "once chunk swap sweep sweep",
    "take_rows": "once chunk",
    "unpack": "once tile",
}
# How often a program waits for memory in each turn of a part: twice where a load needs the result of another.
WAITS = dict(start=0, step=0, once=1, index=2, search=0, range=0, chunk=1, tile=2, swap=2, sweep=1)


def of_tiles(gpu: dict, cost: Cost, rate: float, config: dict[str, int], right: int, half: bool) -> dict[str, float]:
    """Compute the bounds of a product, in seconds, that depend on its tiles.

    Args:
        gpu: one of GPUS.
        cost, rate: the cost, and the roof of its flops.
        config: sizes of tiles.
        right: bytes of an entry of the right operand; the left one has 2.
        half: whether the tiles cover a triangle.
    """
    d, m, n = SIZE.d, config["BLOCK_M"], config["BLOCK_N"]
    tiles = triangle_tiles(d, m, n) if half else ceil(d / m) * ceil(d / n)
    whole = ceil(tiles / gpu["count"]) * gpu["count"] * m * n * (1 + half) / d**2
    cached = gpu["cache"] * 1e9 * gpu["clock"] * ASSUMED["cached"]
    return {"waves": whole * cost.flops / rate, "cache": tiles * (2 * m + right * n) * d / cached}


def of_programs(gpu: dict, row: dict, turns: list[int], waits: int, moved: float) -> dict[str, float]:
    """Compute the bounds, in seconds, that depend on the code of a program.

    Args:
        gpu, row: one of GPUS, and a row of compiled.json.
        turns, waits: how often each part of the code runs, and the program waits for memory.
        moved: seconds in which the bytes of all programs are copied.
    """
    issued, alu = (sum(map(int.__mul__, turns, counts)) for counts in zip(*row["instructions"], strict=True))
    busy = row["warps"] * max(issued / 4, alu / 2) / (1e9 * gpu["clock"])
    threads, programs = 32 * row["warps"], row["programs"] / gpu["count"]
    registers = 65536 // (threads * ceil(row["registers"] / 8) * 8)
    fit = min(registers, gpu["threads"] // threads, gpu["shared"] * 1024 // (row["shared"] + 1024))
    latency = ceil(programs / fit) * (waits * ASSUMED["latency"] + busy) + moved / fit
    return {"instructions": programs * busy, "latency": latency}


def expected(target: str, operation: Operation, setting: str, row: dict) -> dict[str, float | str]:
    """Compute the expected share of the roof, and its limit, from the row of compiled.json."""
    gpu, arguments, name = GPUS[target], operation.example(SIZE, **operation.settings[setting]), operation.name
    cost, config = operation.cost_of(arguments), {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", row["config"])}
    roofs = {unit: 1e12 * gpu[unit] * gpu["library"] for unit in ("bf16", "tf32", "ieee")}
    roofs["copy"] = 1e9 * gpu["memory"] * ASSUMED["copied"]
    moved = cost.bytes / roofs["copy"]
    seconds = {"bytes": moved}
    chunks, swaps = ceil(SIZE.d / config.get("BLOCK_D", SIZE.d)), arguments.get("limit", 0)
    turns = ASSUMED | dict(chunk=chunks, tile=chunks, swap=swaps, sweep=swaps * chunks)
    parts = PARTS.get(f"{name} {setting}", PARTS.get(name, "once"))
    if "BLOCK_N" in config:
        right = arguments["G"].itemsize if name == "product" else 2
        seconds |= of_tiles(gpu, cost, roofs[cost.unit], config, right, name == "gram_accumulate")
        # The loads of the next steps run meanwhile.
        parts, moved, turns["step"] = "start step", 0, SIZE.d // config["BLOCK_K"]
    # With bulk copies the threads issue little: they wait for tensor cores.
    if not row["bulk_copies"]:
        pairs = [(turns.get(part, 1), WAITS[part]) for part in parts.split()]
        seconds |= of_programs(gpu, row, [n for n, _ in pairs], sum(n * waits for n, waits in pairs), moved)
    limit = max(seconds, key=seconds.__getitem__)
    return {"share": round(cost.seconds(roofs) / seconds[limit], 2), "limit": limit}


def shares() -> dict[str, dict]:
    """Compute the content of expected.json."""
    rows = committed()
    found = {"assumptions": GPUS | {"all": ASSUMED}} | {target: {} for target in EXPECTED}
    for name, (operation, launch) in launches().items():
        if launch.size == SIZE:
            setting = next(each for each, options in operation.settings.items() if options == launch.setting)
            for target in EXPECTED:
                settings = found[target].setdefault(operation.name, {})
                settings[setting] = expected(target, operation, setting, rows[name, target])
    return found


def table() -> str:
    """Make the table of the shares."""
    found, rows = shares(), []
    for name, settings in found[EXPECTED[0]].items():
        for setting in settings:
            cells = (found[target][name][setting] for target in EXPECTED)
            rows.append([name, setting, *(f"{cell['share']:.2f} {cell['limit']}" for cell in cells)])
    return markdown(["expected", "setting", *(GPUS[target]["gpu"] for target in EXPECTED)], rows, texts=5)


if __name__ == "__main__":
    FILE.write_text(json.dumps(shares(), indent=1) + "\n", encoding="utf-8")
    print(table())
