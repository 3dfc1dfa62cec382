"""A server for downloads, with no proxy in between; files to export; the library diffusers."""

import shutil
import warnings

import pytest
import torch
from exported import MODEL, weights
from web import Site

from ddim.checkpoints import StoredModel, save_model


@pytest.fixture
def site(monkeypatch):
    """A server; see web.py."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="module")
def hf():
    """The library itself, without its bars and advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield library
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path):
    """A folder that does not stay behind: the large networks fill a disk."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path)


@pytest.fixture
def model_file(tmp_path):
    """model_file(label, spec, ...): a model file with weights of that label."""

    def model_file(label="ema", spec=MODEL, step=790_000, origin=None, seed=0):
        model = StoredModel(spec, weights(seed, spec.network_spec), label, step, origin or {})
        save_model(model, tmp_path / "model.safetensors")
        return str(tmp_path / "model.safetensors")

    return model_file


@pytest.fixture
def training_file(tmp_path):
    """A training checkpoint with online weights of seed 1 and averaged ones of seed 2."""
    checkpoint = {
        "ddim": MODEL.to_dict(),
        "state_dict": {f"network.{name}": value for name, value in weights(1).items()},
        "callbacks": {"EMA": {"decay": 0.9, "updates": 7, "shadow": weights(2)}},
        "global_step": 7,
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    return str(tmp_path / "last.ckpt")
