"""SparseFWModifier for recipes of llm-compressor. Recipes in YAML know the name once this module is imported."""

from sparsefw.extras.llmcompressor import SparseFWModifier

__all__ = ["SparseFWModifier"]
