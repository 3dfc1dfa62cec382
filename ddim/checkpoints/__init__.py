"""Checkpoints that describe themselves."""

from ddim.checkpoints.model import LoadedModel, ModelSpec, load_model, weights_hash

__all__ = ["LoadedModel", "ModelSpec", "load_model", "weights_hash"]
