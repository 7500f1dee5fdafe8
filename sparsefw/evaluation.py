"""Evaluate checkpoints, dense or pruned, on texts and tasks, one block at a time: `evaluate`."""

from sparsefw.extras.evaluation.run import evaluate

__all__ = ["evaluate"]
