"""The machine and the versions that the last bits of a result depend on."""

import importlib.metadata
import platform

import torch

import sparsefw

LIBRARIES = ("torch", "triton", "transformers", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that the numbers depend on."""
    by_name = {"python": platform.python_version(), "sparsefw": sparsefw.__version__}
    for name in LIBRARIES:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = "not installed"
    return by_name


def device_name(device: torch.device) -> str:
    """Name of a GPU, or the architecture of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def machine(device: torch.device) -> dict[str, str]:
    """Device, number of threads and versions: a result's last bits depend on them."""
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return {"device": device_name(device)} | threads | versions()
