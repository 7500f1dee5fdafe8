"""Choose which weights of a layer to keep, and their values; for one layer, or several that read the same input."""
