"""The block loop: calibrate, prune, evaluate and write a model one block at a time."""

from sparsefw.driver.in_memory import run_in_memory
from sparsefw.driver.job import Job
from sparsefw.driver.loop import Outcome, prune_model
from sparsefw.driver.run import run_job
from sparsefw.inputs import Output

__all__ = [
    "Job",
    "Outcome",
    "Output",
    "prune_model",
    "run_in_memory",
    "run_job",
]
