"""Checkpoints that contain a description of their model: write, read, load; convert/ for other code bases."""

from ddim.checkpoints.model import LoadedModel, StoredModel, load_model, read_model, save_model, weights_hash
from ddim.checkpoints.spec import ModelSpec

__all__ = ["LoadedModel", "ModelSpec", "StoredModel", "load_model", "read_model", "save_model", "weights_hash"]
