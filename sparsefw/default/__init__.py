"""The embedded model, and the text that it is trained, calibrated and evaluated on."""
