"""Training: specs, the LightningModule, EMA, callbacks, checkpoints, loggers, and the run that combines them."""
