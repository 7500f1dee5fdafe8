"""Memory and disk of a run, from the shapes of a model alone, and the placement that fits."""
