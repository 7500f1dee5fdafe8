"""Ranks: the processes of one run, each with a GPU of its own, which `torchrun` starts."""

from sparsefw.ranks.group import ALONE, DONE, Handle, LostRankError, Ranks, panels, sent_of_sum, sent_of_sum_at
from sparsefw.ranks.joining import connect, is_rank, joined, joined_with
from sparsefw.ranks.shares import balanced, shares

__all__ = [
    "ALONE",
    "DONE",
    "Handle",
    "LostRankError",
    "Ranks",
    "balanced",
    "connect",
    "is_rank",
    "joined",
    "joined_with",
    "panels",
    "sent_of_sum",
    "sent_of_sum_at",
    "shares",
]
