"""Run a checkpoint: images from their numbers, trajectories, files of samples."""
