"""The commands: a module for each, whose `run` takes the arguments and returns the exit status."""
