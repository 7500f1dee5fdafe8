"""A tiny random checkpoint of every class of transformers, pruned and compared: `bench/sweep.py` runs it."""
