"""Training: the LightningModule, the average of its weights, callbacks, and the run that puts them together."""
