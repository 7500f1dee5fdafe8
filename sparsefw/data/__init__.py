"""Texts to calibrate and evaluate a model on, its tokenizer, and the windows of tokens that are cut from a text."""
