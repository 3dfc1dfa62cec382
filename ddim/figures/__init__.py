"""The figures of the paper from a checkpoint: pictures for print and the tensors behind them."""
