"""Measures of a GPU from a trace of torch.profiler: its idle share, the longest gaps and kernels, rates of copies."""

import json
from collections import defaultdict
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
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    by_category = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            by_category[event.get("cat")].append(event)
    kernels = sorted(by_category["kernel"], key=lambda event: event["ts"])
    if not kernels:
        return {"kernels": 0}
    busy, gaps = _busy(kernels)
    span = max(k["ts"] + k["dur"] for k in kernels) - kernels[0]["ts"]
    return {
        "kernels": len(kernels),
        "span_s": span / 1e6,
        "idle_share": 1 - busy / span,
        "longest_gaps": gaps[:LISTED],
        "copies": _copies(by_category["gpu_memcpy"]),
        "longest_kernels": _by_name(kernels, span)[:LISTED],
    }


def _busy(kernels: list[dict]) -> tuple[float, list[dict[str, Any]]]:
    """Microseconds in which a kernel runs on any stream, and the gaps between, the longest first."""
    busy, end, last, gaps = 0.0, kernels[0]["ts"], "", []
    for kernel in kernels:
        start, stop = kernel["ts"], kernel["ts"] + kernel["dur"]
        if start > end:
            gaps.append({"ms": (start - end) / 1e3, "after": last[:80], "before": kernel["name"][:80]})
        busy += max(0.0, stop - max(start, end))
        if stop >= end:
            end, last = stop, kernel["name"]
    return busy, sorted(gaps, key=lambda gap: -gap["ms"])


def _copies(events: list[dict]) -> list[dict[str, Any]]:
    """Copies by kind, such as "Memcpy HtoD (Pinned -> Device)": how many, GB, seconds and GB/s."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in events:
        sums[event["name"]] = [
            sum(pair)
            for pair in zip(sums[event["name"]], (1, event["args"].get("bytes", 0), event["dur"]), strict=True)
        ]
    return [
        {"copy": name, "count": int(count), "gb": size / 1e9, "s": us / 1e6, "gbs": size / 1e3 / us if us else None}
        for name, (count, size, us) in sums.items()
    ]


def _by_name(kernels: list[dict], span: float) -> list[dict[str, Any]]:
    sums: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        sums[kernel["name"]].append(kernel["dur"])
    return [
        {"kernel": name[:120], "count": len(us), "s": sum(us) / 1e6, "share": sum(us) / span}
        for name, us in sorted(sums.items(), key=lambda item: -sum(item[1]))
    ]
