"""Checkpoints on disk: written whole or not at all, with what they were made from."""
