"""Data sets, the mapping of pixels to [-1, 1], and training batches.

`ddim.data.datamodule` is left out here: sampling and evaluation need not import Lightning.
"""

from ddim.data.datasets import DATASETS, DataSpec, load_images
from ddim.data.images import Images, LazyImages, MemoryImages, normalize, to_uint8

__all__ = ["DATASETS", "DataSpec", "Images", "LazyImages", "MemoryImages", "load_images", "normalize", "to_uint8"]
