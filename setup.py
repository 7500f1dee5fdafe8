"""Packaging. The folder kernels/ is the package sparsefw.kernels, through the link sparsefw/kernels -> ../kernels."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
# Read as text: to import the package takes torch, which an isolated build does not have.
INIT = (ROOT / "sparsefw/__init__.py").read_text(encoding="utf-8")

EVAL = [
    # The first whose TaskManager.load takes tasks and groups that are loaded already.
    "lm_eval>=0.4.12",
]
LLMCOMPRESSOR = [
    # The first tested one, whose transformers is 5.15 to 5.17.
    "llmcompressor>=0.14",
]
# The harness's own model, which tests compare with, takes accelerate.
TEST = [*EVAL, "accelerate", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "matplotlib"]
# A text of tests is made of docstrings, mypy's among them.
TEST.append("mypy")
# tests/test_packaging.py builds without isolation; older ones need the package wheel for it.
TEST.append("setuptools>=70.1")

# Packed products and selection on a CPU: no module of Python's, kernels/cpu/library.py loads it. Without a compiler the
# package is installed without it, and torch does that work.
PACKED = Extension(
    "sparsefw.kernels.cpu._packed",
    ["kernels/cpu/packed.cpp", "kernels/cpu/selection.cpp"],
    depends=["kernels/cpu/packed_loops.h"],
    extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    name="sparsefw",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="Prune large language models on one card: Frank-Wolfe mask selection with Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # kernels/ has no __init__.py (why: tests/test_packaging.py), so find_packages passes over it.
    packages=[*find_packages(include=["sparsefw", "sparsefw.*"]), "sparsefw.kernels", "sparsefw.kernels.cpu"],
    package_data={
        "sparsefw": ["py.typed"],
        "sparsefw.extras.page": ["page.html", "card.md"],
        "sparsefw.default": ["model/*"],
    },
    # `make versions` reads the lower bounds from here and tests with exactly these.
    ext_modules=[PACKED],
    install_requires=[
        "torch>=2.10",
        # torch for the CPU brings no Triton; torch for CUDA pins its own (2.10 and 2.11: 3.6, 2.15: 3.9).
        # The interpreter of 3.5 takes a tensor descriptor's strides for bytes and refuses half of the good ones.
        "triton>=3.6; platform_system == 'Linux'",
        # Private names of it are used (see sparsefw/model), which a new major version may move.
        "transformers>=5.17,<6",
        "numpy>=2.0",
        "psutil>=5.9",
        "datasets>=4.0",
        "pyarrow>=18.0",
        "safetensors>=0.8",
        "huggingface_hub>=1.5",
        "jinja2>=3.1",
        "tqdm>=4.66.3",
        "msgspec>=0.19",
        "filelock>=3.13",
    ],
    extras_require={"eval": EVAL, "llmcompressor": LLMCOMPRESSOR, "test": TEST, "dev": [*TEST, "ruff", "pre-commit"]},
    entry_points={"console_scripts": ["sparsefw=sparsefw.cli:main"]},
)
