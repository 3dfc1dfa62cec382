"""Models to write and files to read; a server for downloads, with no proxy in between; the library diffusers."""

import warnings
from dataclasses import replace

import pytest
from layouts import NETWORK, PLAIN, SMALLEST, foreign_folder, gaussian_weights, lightning, save, weights
from web import Site

from ddim import linear_schedule
from ddim.checkpoints import ModelSpec, StoredModel, save_model
from ddim.checkpoints.convert.model_zoo import PRESETS


@pytest.fixture(scope="session")
def state():
    return weights()


@pytest.fixture(scope="session")
def model(state):
    return StoredModel(PLAIN, state, "ema", 790_000)


@pytest.fixture(scope="session")
def smallest():
    """A model of which every byte and entry can be tried."""
    return StoredModel(ModelSpec("unet", SMALLEST, linear_schedule(10)), weights(SMALLEST), "ema", 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def flat(state, tmp_path):
    return save(state, tmp_path / "flat.ckpt")


@pytest.fixture
def folder(model, tmp_path):
    """A folder of diffusers, without our header."""
    return foreign_folder(model, tmp_path)


@pytest.fixture
def presets(monkeypatch):
    """Three small networks in place of the published ones, which the slow tests take."""
    small = {
        "cifar10": NETWORK,
        "celeba": replace(NETWORK, ch_mult=(1, 2, 2), dropout=0.2),
        "lsun": replace(NETWORK, ch=16, channels=3),
    }
    for name, network in small.items():
        monkeypatch.setitem(PRESETS, name, network)
    return small


@pytest.fixture
def model_file(path):
    """model_file(label, spec, ...): a model file with weights of that label."""

    def model_file(label="ema", spec=PLAIN, step=790_000, origin=None, seed=0, recipe=None):
        state = gaussian_weights(spec.network_spec, seed)
        save_model(StoredModel(spec, state, label, step, origin or {}, recipe=recipe or {}), path)
        return str(path)

    return model_file


@pytest.fixture
def training_file(model, tmp_path):
    """A training checkpoint with online weights of seed 1 and averaged ones of seed 2."""
    trained = replace(model, state=weights(seed=2), step=7)
    return save(lightning(trained, weights(seed=1)), tmp_path / "last.ckpt")


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
