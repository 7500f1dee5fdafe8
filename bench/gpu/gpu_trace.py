"""Measures of a GPU from a trace of torch.profiler: its idle share, the longest gaps and kernels, rates of copies."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Kernels and gaps that are listed.
LISTED = 25


def summary(path: Path) -> dict[str, Any]:
    """Summarize a trace that `profile.export_chrome_trace` wrote.

    Args:
        path: the trace, JSON.

    Returns:
        Seconds from the first to the last kernel, the share of them without a kernel, the longest gaps between kernels,
        copies by kind, and kernels by name. Without any kernel, nothing but their number.
    """
    trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    if not kernels:
        return {"kernels": 0}
    idle, end, last, gaps = 0.0, kernels[0]["ts"], "", []
    for kernel in kernels:
        if kernel["ts"] > end:
            idle += kernel["ts"] - end
            gaps.append({"ms": (kernel["ts"] - end) / 1e3, "after": last[:80], "before": kernel["name"][:80]})
        if kernel["ts"] + kernel["dur"] >= end:
            end, last = kernel["ts"] + kernel["dur"], kernel["name"]
    span = end - kernels[0]["ts"]
    copies = _by_name([event for event in events if event.get("cat") == "gpu_memcpy"])
    return {
        "kernels": len(kernels),
        "span_s": span / 1e6,
        "idle_share": idle / span,
        "longest_gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:LISTED],
        "copies": [row | {"gbs": row["gb"] / row["s"] if row["s"] else None} for row in copies],
        "longest_kernels": [row | {"share": row["s"] * 1e6 / span} for row in _by_name(kernels)[:LISTED]],
    }


def _by_name(events: Sequence[dict]) -> list[dict[str, Any]]:
    """Events by name, such as "Memcpy HtoD (Pinned -> Device)": how many, seconds and GB, the longest first."""
    found = defaultdict(list)
    for event in events:
        found[event["name"][:120]].append(event)
    rows = []
    for name, each in found.items():
        s, gb = sum(event["dur"] for event in each) / 1e6, sum(event["args"].get("bytes", 0) for event in each) / 1e9
        rows.append({"name": name, "count": len(each), "s": s, "gb": gb})
    return sorted(rows, key=lambda row: -row["s"])
