"""Checkpoints that describe themselves; published ones in, and ours out."""

from ddim.checkpoints.model import LoadedModel, StoredModel, load_model, read_model, save_model, weights_hash
from ddim.checkpoints.spec import ModelSpec

__all__ = ["LoadedModel", "ModelSpec", "StoredModel", "load_model", "read_model", "save_model", "weights_hash"]
