"""Packed checkpoints: folders are packed and unpacked, and transformers loads them."""
