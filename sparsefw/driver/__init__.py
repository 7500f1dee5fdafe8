"""The block loop: calibrate, prune, evaluate and write a model one block at a time."""

from sparsefw.driver.loop import Outcome, prune_model

__all__ = [
    "Outcome",
    "prune_model",
]
