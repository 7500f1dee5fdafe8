"""The time of a run, operation by operation: `python bench/runs/profile_run.py` with the run's own flags.

All threads are counted together, and so are kernels on a GPU.
"""

import sys
from pathlib import Path

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from sparsefw import run

ROWS = 20


def main() -> int:
    """Run under the profiler, and print the operations that take most; returns the run's exit status."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)) as profiled:
        status = run.main(sys.argv[1:])
    if status == 0:
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(profiled.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=40))
    return status


if __name__ == "__main__":
    sys.exit(main())
