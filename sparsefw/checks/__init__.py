"""Checks of a pruned checkpoint against its report and its source."""
