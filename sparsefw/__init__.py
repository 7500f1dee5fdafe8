"""Prune large language models by Frank-Wolfe on the convex relaxation of mask selection (arXiv 2510.13713)."""
