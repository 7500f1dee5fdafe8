"""The block loop: calibrate, prune, evaluate and write a model one block at a time."""

from sparsefw.driver.in_memory import run_in_memory
from sparsefw.driver.job import CheckpointJob, Job
from sparsefw.driver.loop import Outcome, prune_model
from sparsefw.driver.run import run_job
from sparsefw.driver.saved import explained_saving
from sparsefw.inputs import Output

__all__ = [
    "CheckpointJob",
    "Job",
    "Outcome",
    "Output",
    "explained_saving",
    "prune_model",
    "run_in_memory",
    "run_job",
]
