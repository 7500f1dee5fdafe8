"""The block loop: calibrate, prune, evaluate and write a model one block at a time."""

from sparsefw.driver.loop import Outcome, prune_model
from sparsefw.driver.run import Job, Output, run_job

__all__ = ["Job", "Outcome", "Output", "prune_model", "run_job"]
