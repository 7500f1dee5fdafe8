"""Packaging: the top-level folder kernels/ is installed as the package sparsefw.kernels."""

from pathlib import Path

from setuptools import setup

PACKAGES = ["checkpoint", "checks", "data", "default", "driver", "estimate", "kernels", "model", "report", "solver"]

setup(
    name="sparsefw",
    version="0.1.0",
    description="Prune large language models on one card: Frank-Wolfe mask selection with Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=["sparsefw", *(f"sparsefw.{name}" for name in PACKAGES)],
    package_dir={"sparsefw": "sparsefw", "sparsefw.kernels": "kernels"},
    package_data={"sparsefw.report": ["page.html"], "sparsefw.default": ["model/*"]},
    install_requires=[
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
        "transformers>=5.17",
        "numpy",
        "datasets",
        "safetensors",
        "huggingface_hub",
        "jinja2",
        "tqdm",
    ],
    extras_require={"test": ["pytest", "pytest-benchmark", "hypothesis", "ruff", "matplotlib"]},
    entry_points={"console_scripts": ["sparsefw=sparsefw.run:main"]},
)
