"""Run `python -m bench` for parts of the page. FOLDER/PART.json is for `python -m bench report`."""

import json

from gpu import Part, python

# (rows, d): chunks of a 70B run, and layers of 8B; in PRODUCTS also chunks that fill the waves of 132 multiprocessors.
CHUNKS = ["6528x8192", "1856x28672", "4096x4096", "4096x14336"]
PRODUCTS = [*CHUNKS, "4224x8192", "10240x8192", "4224x28672"]
PACKED = ["4096x4096", "8192x8192", "8192x28672"]
# The operations of each part, with their shapes.
OPERATIONS = {
    "products": (["product"], PRODUCTS),
    "accumulations": (["gram", "cross"], CHUNKS),
    "packed": (["packed"], PACKED),
    "row kernels": (["row_step", "conjugate", "lmo", "adam"], CHUNKS),
}


def compare(part: Part) -> None:
    """Compare the operations of a part of `OPERATIONS` with their rivals; each row becomes a line of the results."""
    names, shapes = OPERATIONS[part.name]
    path = part.path(".json")
    path.unlink(missing_ok=True)
    sizes = [word for shape in (["48x96"] if part.tiny else shapes) for word in ("--shape", shape)]
    limits = ["--tokens", 100, "--seconds", 0.01] if part.tiny else ["--tokens", 16384, "--seconds", 0.5]
    try:
        python("-m", "bench", *names, *sizes, *limits, "--providers", "ours,torch,library", "--json", path)
    finally:
        for row in json.loads(path.read_text("utf-8"))["rows"] if path.exists() else ():
            part.add(**row)
