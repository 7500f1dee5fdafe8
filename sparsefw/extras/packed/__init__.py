"""Pack and unpack checkpoints, and load packed checkpoints in transformers."""
