"""Perplexity and tasks of checkpoints, dense or pruned, one block at a time: `evaluate`."""

from sparsefw.extras.evaluation import evaluate

__all__ = ["evaluate"]
