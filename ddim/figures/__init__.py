"""The paper's figures from a checkpoint: pictures for print and their tensors."""
