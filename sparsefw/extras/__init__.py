"""What only some runs need, a package or a module for each. No other module imports from here but the entry points."""
