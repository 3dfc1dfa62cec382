"""Conversion of checkpoints from and to other code bases."""
