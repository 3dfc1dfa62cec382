"""Plugins: the examples of docs/plugins.md as a user runs them, and what records and checkpoints say about them."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ddim.plugins
from ddim.checkpoints import load_model
from ddim.data import DATASETS
from ddim.diffusion.labels import LABELS
from ddim.diffusion.registry import RULES
from ddim.errors import UserError
from ddim.evaluation.metrics import METRICS
from ddim.networks import NETWORKS

pytestmark = pytest.mark.integration
Run = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


PLUGIN, NETWORK, LIBRARY = blocks("python")
TRAIN, EVALUATE = blocks("bash")[0].strip().splitlines()
SMALL = ("trainer.max_steps=2", "trainer.log_every=1", "trainer.accelerator=cpu", "grid.every=0")


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of the page, in the folder of the commands; what they register ends with the test."""
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "my_network.py").write_text(NETWORK)
    registries: tuple[dict[str, Any], ...] = (DATASETS, RULES, LABELS, METRICS, NETWORKS, ddim.plugins._imported)
    before = [dict(registry) for registry in registries]
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in ("my_plugin", "my_network"):
        sys.modules.pop(name, None)


def words(command: str) -> list[str]:
    """Return script and arguments of a command of the page."""
    script, *arguments = shlex.split(command)[1:]
    return [Path(script).stem, *arguments]


def test_a_plugin_adds_data_sampler_and_metric(run: Run, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """In about twenty lines, as the page says; the records state it."""
    assert len([line for line in PLUGIN.splitlines() if line]) <= 20
    done = run(*words(TRAIN), *SMALL)
    assert (done.code, done.err) == (0, "")
    checkpoint = tmp_path / "outputs" / "train" / "stripes" / "checkpoints" / "last.ckpt"
    assert load_model(checkpoint).spec.plugins == ("my_plugin",)

    tiny = make_checkpoint(tmp_path / "tiny.ckpt")
    evaluate = words(EVALUATE.replace("PATH", str(tiny)).replace("n=100", "n=8"))
    done = run(*evaluate, "sampler.S=2", "grid=0", "compute.device=cpu", "output_dir=out")
    assert (done.code, done.err) == (0, "")
    record = json.loads((tmp_path / "out" / "records.jsonl").read_text())
    assert (record["label"], record["reference"]["name"], list(record["metrics"])) == (
        "half",
        "stripes",
        ["mean_pixels_8"],
    )
    assert record["versions"]["my_plugin"] == "unknown"  # it is no installed package


def test_a_network_of_a_plugin_trains_and_samples(run: Run, tmp_path: Path) -> None:
    options = tmp_path / "my_configs" / "network"
    options.mkdir(parents=True)
    (options / "mlp.yaml").write_text(blocks("yaml")[0])
    (command,) = blocks("bash")[1].strip().splitlines()
    done = run(*words(command), *SMALL)
    assert done.code == 0, done.err
    checkpoint = "checkpoint=outputs/train/mlp/checkpoints/last.ckpt"
    plugin = "plugins=[my_network]"
    done = run("sample", plugin, checkpoint, "n=4", "sampler.S=2", "compute.device=cpu")
    assert (done.code, done.out.splitlines()[-2]) == (0, "outputs/samples/grid.png")

    for layout in ("diffusers", "flat"):
        done = run("export_checkpoint", plugin, checkpoint, f"layout={layout}", "output_dir=out")
        assert (done.code, done.out) == (2, "")
        expected = f"error: layout={layout} holds DDPM's U-Net, not the network 'mlp'; choose layout=safetensors, "
        assert done.err.startswith(expected)
        assert len(done.err.splitlines()) == 1
    done = run("export_checkpoint", plugin, checkpoint, "layout=safetensors", "output_dir=out")
    assert (done.code, done.err) == (0, "")
    NETWORKS.pop("mlp")
    for path in ("out/model.safetensors", checkpoint.partition("=")[2]):
        with pytest.raises(UserError, match=r"network 'mlp' is none of this package.*add plugins=\[my_network\] to"):
            load_model(path)


def test_a_plugin_trains_and_is_evaluated_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    exec(
        LIBRARY.replace('"max_steps": 500', '"max_steps": 2, "log_every": 1, "accelerator": "cpu"').replace(
            "1000", "8"
        ),
        names,
    )
    assert load_model(names["trained"].checkpoint).spec.plugins == ("my_network",)
    [record] = map(json.loads, (tmp_path / "runs" / "table" / "records.jsonl").read_text().splitlines())
    assert record["metrics"] == names["record"]["metrics"]
    assert list(record["metrics"]) == ["fd_pixels_8"]
    assert "my_network" in record["versions"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[not_there]", "the plugin not_there cannot be imported (ModuleNotFoundError: No module named 'not_there')"),
        ("[broken]", "the plugin broken cannot be imported (ZeroDivisionError: division by zero); give the name"),
        ("[broken] -m", "the plugin broken cannot be imported"),
        ("my_plugin", "plugins='my_plugin' must be a list"),
        ("[3]", "plugins[0]=3 must be text"),
    ],
)
def test_a_wrong_plugin_is_one_line(run: Run, tmp_path: Path, value: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    done = run("evaluate", "checkpoint=x", *f"plugins={value}".split())
    assert done.code == 2
    [line] = done.err.splitlines()
    assert message in line
    assert re.fullmatch(r"error: .*\.", line)
