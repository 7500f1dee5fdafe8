"""Prune large language models by Frank-Wolfe on the convex relaxation of mask selection (arXiv 2510.13713)."""

import pathlib

_repo = pathlib.Path(__file__).resolve().parents[1]
if (_repo / "setup.py").exists():
    # A source checkout: kernels/ lies beside this folder, and sparsefw.kernels is found there.
    __path__.append(str(_repo))
