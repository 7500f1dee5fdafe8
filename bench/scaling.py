"""How a run gets faster with more GPUs, by `sparsefw.plan`: the tables of docs/scaling.md, as Markdown.

python bench/scaling.py
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import sparsefw.plan

CONFIGS = ("Meta-Llama-3-70B", "Llama-3.1-405B")

# GPUs on a machine, and machines.
SIZES = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2))

# Expected of an H100 (not measured), and of its links.
RATES = ("--tflops", "bf16=760", "--tflops", "tf32=380", "--tflops", "ieee=50", "--bandwidth", "3000")
LINK, NETWORK = ("--link", "400"), ("--network", "50")

GIB = 2**30


def command(config: str, gpus: int, nodes: int) -> list[str]:
    """The arguments of the plan."""
    several = ["--gpus", str(gpus), *LINK] if gpus > 1 else []
    machines = ["--nodes", str(nodes), *NETWORK] if nodes > 1 else []
    return ["--model", f"bench/configs/{config}.json", "--gpu", "h100", *several, *machines, *RATES]


def planned(arguments: list[str]) -> dict[str, Any]:
    """What the plan says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        with contextlib.redirect_stdout(io.StringIO()):
            status = sparsefw.plan.main([*arguments, "--json", str(path)])
        if status:
            raise SystemExit(status)
        content: dict[str, Any] = json.loads(path.read_text())
        return content


def main() -> None:
    """Print the tables, and the commands behind them."""
    commands = []
    for config in CONFIGS:
        print(f"{config}:\n")
        heads = "H100s", "minutes", "speed-up", "sending, %", "GB sent a block", "rows, windows", "GPU, GiB"
        print(f"| {' | '.join(heads)} | a machine's host, GiB |")
        print("| --- " * 8 + "|")
        alone = 0.0
        for gpus, nodes in SIZES:
            arguments = command(config, gpus, nodes)
            commands.append(" ".join(["python -m sparsefw.plan", *arguments]))
            content = planned(arguments)
            seconds = content["seconds"]["all"]
            alone = alone or seconds
            sent, shares = content.get("traffic"), content.get("ranks", {}).get("imbalance", {})
            gpu, host = (max(peak[what] for peak in content["memory"].values()) / GIB for what in ("gpu", "host"))
            cells = [
                f"{gpus * nodes}",
                f"{seconds / 60:.1f}",
                f"{alone / seconds:.2f}",
                f"{100 * sent['share']:.1f}" if sent else "0",
                f"{sum(sent['block'].values()) / 1e9:.1f}" if sent else "0",
                f"{shares['rows']:.3f}, {shares['windows']:.3f}" if shares else "1, 1",
                f"{gpu:.1f}",
                f"{gpus * host:.1f}",
            ]
            print(f"| {' | '.join(cells)} |")
        print()
    print("```sh", *commands, "```", sep="\n")


if __name__ == "__main__":
    main()
