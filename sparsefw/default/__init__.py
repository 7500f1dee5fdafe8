"""The built-in model, and the text that it is trained, calibrated and evaluated on."""
