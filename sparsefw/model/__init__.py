"""A model that is run one block at a time: its blocks, their prunable layers, and the hidden states between them."""
