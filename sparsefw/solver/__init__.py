"""The solver: choose which weights of one layer, or of several with the same input, are kept, and their values."""
