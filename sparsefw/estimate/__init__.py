"""Estimate the memory and disk of a run from the model's shapes alone, and choose a placement that fits."""
