"""What models of real size would take, by `sparsefw.plan` of the configs in bench/configs."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import sparsefw.plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FLAGS = ["--nsamples", "256", "--seqlen", "2048"]
# The Gram matrices of DeepSeek-V3's 256 experts take 53 GB, beside a block of 23 GB in bf16. To
# reconstruct it takes more than any card has.
FLAGS_OF = {"DeepSeek-V3": ["--gpu", "h200", "--reconstruct", "0"]}


def plans() -> list[dict[str, Any]]:
    """A row for each config: name, command, and what the plan says; "refused" instead where the plan refuses it."""
    rows = []
    for path in sorted(CONFIGS.glob("*.json")):
        flags = [*FLAGS_OF.get(path.stem, ["--gpu", "h100"]), *FLAGS]
        arguments = ["--model", f"bench/configs/{path.name}", *flags]
        row = {"model": path.stem, "command": " ".join(["python -m sparsefw.plan", *arguments])}
        rows.append(row | _planned(["--model", str(path), *flags]))
    return rows


def _planned(arguments: list[str]) -> dict[str, Any]:
    err = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = sparsefw.plan.main([*arguments, "--json", str(path)])
        if status:
            return {"refused": err.getvalue().strip().removeprefix("sparsefw: ").replace(f"{CONFIGS}/", "")}
        content = json.loads(path.read_text())
    return {
        "class": content["model"]["class"],
        "parameters": content["model"]["parameters"],
        "pflop": content["phases"]["all"]["run"]["flops"] / 1e15,
        "gpu_bytes": max(peak["gpu"] for peak in content["memory"].values()),
        "host_bytes": max(peak["host"] for peak in content["memory"].values()),
        "output_bytes": content["disk"]["output"],
    }
