"""The built-in model, and the text that it is trained, calibrated and evaluated on.

bench/train_default.py of commit f00a6781 trained the model.
"""
