"""The block loop: calibrate, prune, evaluate and write a model one block at a time."""
