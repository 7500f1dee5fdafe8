"""Provide SparseFWModifier for llm-compressor. Importing this module registers the name for recipes in YAML."""

from sparsefw.extras.llmcompressor import SparseFWModifier

__all__ = ["SparseFWModifier"]
