"""Checkpoints on disk: read only if they can be trusted, and written so that an interrupted run can go on."""
