"""Calibration windows of several texts: how many of each, and in what order."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sparsefw.data.tokenizer import Tokenizer
from sparsefw.data.windows import Windows, calibration_windows, make_windows
from sparsefw.errors import InputError, shown


def mixed_windows(
    tokenizer: Tokenizer,
    shares: Mapping[str, float],
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    room: int | None = None,
) -> Windows:
    """Draw windows of several texts, in an order at random. Those of one text are as `calibration_windows` draws them.

    Args:
        tokenizer: the model's tokenizer.
        shares: how many of the windows each text has, against the others; texts by name, see `read_text`.
        nsamples, seqlen, seed, room: as for `calibration_windows`; `nsamples` windows in all.

    Raises:
        InputError: as `calibration_windows`; or the share of a text is no window.
    """
    options: dict[str, Any] = dict(seqlen=seqlen, seed=seed)
    if len(shares) == 1:
        return calibration_windows(tokenizer, next(iter(shares)), nsamples=nsamples, room=room, **options)
    ids = torch.empty(nsamples, seqlen, dtype=torch.int64)
    left = None if room is None else room - ids.nbytes
    # Some of the windows are held out, and all are learned from in turn: each part has some of every text.
    order = torch.randperm(nsamples, generator=torch.Generator().manual_seed(seed)).argsort()
    sources, numbers = [], counts(nsamples, list(shares.values()))
    for (name, share), n, places in zip(shares.items(), numbers, order.split(numbers), strict=True):
        if not n:
            raise InputError(f"--dataset {shown(name)}: its share, {share:g}, is none of {nsamples} windows; give more")
        windows = calibration_windows(tokenizer, name, nsamples=n, room=left, alone=False, **options)
        ids[places] = windows.ids
        sources.append(f"{windows.source} ({n})")
    return make_windows(ids, " + ".join(sources))


def counts(n: int, shares: Sequence[float]) -> list[int]:
    """n windows by share: each count is rounded down, and one more where that cuts most off; of equals the first."""
    # Relative to the largest: the sum of the shares as they are may be infinite.
    relative = [share / max(shares) for share in shares]
    exact = [n * share / sum(relative) for share in relative]
    found = [math.floor(count) for count in exact]
    by_loss = sorted(range(len(shares)), key=lambda i: found[i] - exact[i])
    for i in by_loss[: n - sum(found)]:
        found[i] += 1
    return found
