"""The checkpoints of other code bases, in and out."""
