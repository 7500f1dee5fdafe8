"""Print the benchmarks of a card: `python bench/tables.py FOLDER`, of the bench.json that pytest wrote there.

`pytest bench/kernels/bench_*.py bench/runs/bench_*.py --benchmark-json=FOLDER/bench.json` writes bench.json. The roofs
are those that bench_roofs.py measured in the same run. A row's share is the time that its flops and bytes imply at the
roofs, over the time that was measured: 1 is as fast as can be.
"""

import argparse
import json
from pathlib import Path

from cost import Cost


def rows_of(results: dict) -> list[dict]:
    """One row per benchmark: operation, case, way, median in seconds, flops, bytes, unit."""
    rows = []
    for bench in results["benchmarks"]:
        parameters = dict(bench["params"] or {})
        # The way says how an operation is done, all others what is done.
        way = parameters.pop("way", "")
        case = ", ".join(" x ".join(map(str, v)) if isinstance(v, list) else str(v) for v in parameters.values())
        operation = bench["name"].removeprefix("test_").split("[")[0]
        rows.append(
            dict(operation=operation, case=case, way=way, median=bench["stats"]["median"], **bench["extra_info"])
        )
    return rows


def roofs_of(rows: list[dict]) -> dict[str, float]:
    """Measured roofs: "copy" in bytes per second, and by precision in flops per second."""
    roofs = {row["case"]: row["flops"] / row["median"] for row in rows if row["operation"] == "matmul"}
    (roofs["copy"],) = (row["bytes"] / row["median"] for row in rows if row["operation"] == "copy")
    return roofs


def share(row: dict, roofs: dict[str, float]) -> float:
    """The share of the roof that a row reaches."""
    flops = row["flops"] if row["unit"] else 0
    return Cost(flops, row["bytes"]).seconds(roofs.get(row["unit"], 1.0), roofs["copy"]) / row["median"]


def table(rows: list[dict]) -> str:
    """A line for each row: its time, share of the roof, and its time over that of the Triton kernel."""
    roofs, known = roofs_of(rows), rows[0]
    ours = {(row["operation"], row["case"]): row["median"] for row in rows if row["way"] == "triton"}
    lines = [f"{known['device']}, torch {known['torch']}, triton {known['triton']}"]
    lines.append(f"{'operation':18}{'case':28}{'way':16}{'ms':>10}{'share':>8}{'/ ours':>8}")
    for row in rows:
        against = row["median"] / ours.get((row["operation"], row["case"]), row["median"])
        names = f"{row['operation']:18}{row['case']:28}{row['way']:16}"
        lines.append(f"{names}{1e3 * row['median']:10.3f}{share(row, roofs):8.0%}{against:8.2f} {row['note']}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Read FOLDER/bench.json and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(table(rows_of(json.loads((folder / "bench.json").read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
