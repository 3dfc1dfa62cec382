"""Wrong commands end with one line that states what was wrong and what is allowed, and write no file."""

import dataclasses
import errno
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import NETWORK, SPEC, weights

from ddim import linear_schedule, zero_terminal_snr
from ddim.checkpoints import ModelSpec, StoredModel, save_model
from ddim.networks import build_network
from ddim.networks.categorical import CategoricalUNetSpec

pytestmark = pytest.mark.integration
Run = Callable[..., Any]

OPTIONS = "checkpoint=tiny.ckpt n=4 output_dir=out compute.device=cpu"
# Written in capitals below. The model of the checkpoint has T=50, that of training T=1000.
SHORT = {
    "EVALUATE": f"evaluate {OPTIONS} data=digits metric=digits_classifier",
    "SWEEP": f"evaluate -m {OPTIONS} data=digits metric=digits_classifier",
    "SAMPLE": f"sample {OPTIONS}",
    "VARIANCE": "estimate_variance checkpoint=tiny.ckpt data=digits output_dir=out compute.device=cpu",
    "ENCODE": "encode source=small output_dir=out compute.device=cpu",
    "RECONSTRUCT": f"reconstruct {OPTIONS} data=digits",
    "LIKELIHOOD": f"likelihood {OPTIONS} data=digits",
    "SOLVER_ERROR": f"solver_error {OPTIONS}",
    "SEARCH_TAU": f"search_tau {OPTIONS}",
    "FIGURES": "figures checkpoint=tiny.ckpt output_dir=out compute.device=cpu",
    "TRAIN": "train network=unet_digits trainer.max_steps=2 trainer.accelerator=cpu output_dir=out",
    "FOLDER": "data=folder data.size=[8,8] data.channels=1",
    "METRICS": "metrics data=digits metric=digits_classifier device=cpu",
    "IMPORT": f"import_checkpoint checkpoint=flat.ckpt {' '.join(NETWORK)}",
    "EXPORT": "export_checkpoint checkpoint=m.safetensors output_dir=x",
}

# Each line: a command -> what its one line states | and states.
MISTAKES = r"""
SAMPLE sampler.S=0 -> S=0 | at least 1
EVALUATE sampler.S=2000 -> S=2000 | T=50 | must lie in 1..50
FIGURES figure=consistency S=[10,2000] -> sampler: S=2000 | T=50 | must lie in 1..50
TRAIN data=digits grid.sampler.S=2000 -> grid.sampler: S=2000 | T=1000
SAMPLE sampler.S=null sampler.spacing=ddim30 -> spacing=ddim30 does not exist for T=50
SAMPLE sampler.spacing=ddim25 -> S=50 contradicts spacing=ddim25 | set S=null
SAMPLE sampler.corrector_snr=0.1 -> sampler: corrector_snr=0.1 needs corrector_steps
FIGURES figure=interpolation sampler=ddim_corrector -> interpolation needs a deterministic sampler
SAMPLE sampler.clip_range=2 -> need clip=x0
SAMPLE checkpoint=zero_snr.safetensors -> a network that predicts ε gives no x0 | prediction=v or x0
TRAIN data=digits schedule.zero_terminal_snr=true -> objective: a network that predicts ε | prediction=v or x0
SAMPLE like=oficial -> like=oficial | did you mean official? | allowed: diffusers, official, paper
SAMPLE sampler.eta=-1 -> eta=-1.0 | must lie in [0, 1]
SAMPLE sampler.eta=abc -> sampler.eta='abc' | must be a number, not text
SAMPLE sampler=multinomial -> sampler: rule=multinomial | pixels are numbers | any other rule
SAMPLE sampler=multinomial sampler.corrector_steps=1 -> sampler: a corrector follows the score | corrector_steps=0
SAMPLE sampler=multinomial sampler.kwargs.sigma_fraction=2 -> sigma_fraction=2 | [0, 1]
TRAIN data=digits objective=multinomial -> network.name=unet and objective.multinomial=cross_entropy do not fit
TRAIN data=digits network=categorical_unet_digits network.categories=1 -> categories=1 must be 2 to 256
TRAIN data=digits objective=multinomial objective.prediction=eps -> needs prediction=x0
SAMPLE sampler=analytic -> sampler: analytic needs file=PATH | scripts/estimate_variance.py
SAMPLE sampler=analytic sampler.kwargs.file=text -> sampler: file=text was not written by | estimate again
VARIANCE n=1 -> n=1 must be at least 2
VARIANCE checkpoint=categorical.safetensors -> pixels that are numbers | one of 3 categories
ENCODE checkpoint=categorical.safetensors -> pixels that are numbers | one of 3 categories
RECONSTRUCT checkpoint=categorical.safetensors -> pixels that are numbers | one of 3 categories
LIKELIHOOD checkpoint=categorical.safetensors -> pixels that are numbers | one of 3 categories
SOLVER_ERROR checkpoint=categorical.safetensors -> pixels that are numbers | one of 3 categories
SEARCH_TAU checkpoint=categorical.safetensors -> pixels that are numbers | one of 3 categories
VARIANCE sampler=ddim sampler.S=60 -> sampler: S=60 | T=50
VARIANCE FOLDER data.size=[16,16] data.root=large -> (1, 8, 8) | (1, 16, 16) | choose the data
SAMPLE sampler=sigma_hat sampler.eta=0.5 -> rule=sigma_hat does not take eta | null
SAMPLE sampler.rule=dims -> rule='dims' is not known | sigma_hat | diffusers
SAMPLE sampler=unipc sampler.kwargs={corrector:1} -> corrector=1 of rule=unipc must be true or false
SAMPLE sampler=deis sampler.order=3 sampler.S=2 -> rule=deis uses 3 predictions | 2 steps | at least 3 steps
SAMPLE sampler=diffusers -> sampler: | give scheduler=NAME
SAMPLE sampler=diffusers sampler.scheduler=DDIMSchedule -> not known to diffusers | did you mean DDIMScheduler?
EVALUATE sampler=diffusers sampler.scheduler=DDIMScheduler sampler.S=60 -> sampler: DDIMScheduler cannot sample
FIGURES figure=interpolation sampler=diffusers sampler.scheduler=DDIMScheduler -> sampler: | choose a rule: ddim
FIGURES figure=consistency S=[10,2] sampler=deis -> sampler: rule=deis uses 3 predictions | 2 steps
TRAIN data=digits sampler@grid.sampler=diffusers grid.sampler.scheduler=DDIMScheduler -> grid.sampler: | choose a rule
SAMPLE seed=abc -> seed='abc' | must be an integer, not text
EVALUATE seed=-1 -> seed=-1 must lie in 0 .. 2**64 - 1
EVALUATE n=0 -> n=0 must be at least 1
SAMPLE n=0 -> n=0 must be at least 1
EVALUATE metric.metrics=fd -> metric.metrics='fd' must be a list
SAMPLE compute.device=abacus -> device=abacus | choose cpu
SAMPLE hydra/launcher=box -> hydra/launcher=box: a launcher starts the jobs of a sweep; add -m
TRAIN data=digits trainer.devices=[2,2] -> devices=[2, 2] must hold the numbers of different GPUs, such as [0,2]
FIGURES figure=interpolation indices=[1,2,3] -> pairs of images, not 3 | an even number

FIGURES figure=samlpes -> unknown option figure=samlpes | did you mean samples? | allowed: all, consistency
SAMPLE sampler.etta=1 -> sampler.etta | did you mean sampler.eta? | sampler.clip
EVALUATE etta=1 -> unknown key etta | did you mean sampler.eta?
SAMPLE +sampler.etta=1 -> unknown key sampler.etta | did you mean eta? | allowed:
SWEEP sampler.etta=0,1 -> sampler.etta | did you mean sampler.eta?
TRAIN data=folder data.in_memry=false -> data.in_memry | did you mean data.in_memory?
SAMPLE samplr.eta=1 -> unknown key samplr.eta | did you mean sampler? | allowed:
TRAIN data=cifar11 -> data=cifar11 | did you mean cifar10? | allowed: celeba, cifar10, digits
TRAIN data=digits data.name=cifar11 -> unknown data set 'cifar11' | did you mean cifar10? | lsun
train experiment=digitz -> experiment=digitz | did you mean digits? | allowed: bedroom
SAMPLE sampler.S=5,6 -> sampler.S=5,6 | --multirun
SAMPLE seed -> the argument 'seed' cannot be read | write key=value
TRAIN data.size=[8 -> the argument 'data.size=[8' cannot be read
EVALUATE sampler=[ddim,ddpm] -> sampler takes one option | write sampler=ddim,ddpm with -m
SWEEP sampler=[ddim],ddpm -> sampler takes one option
TRAIN data=digits trainer=null -> trainer takes one option; allowed: cpu, ddp
TRAIN data=digits +optim=official -> write optim=official, without +
SWEEP sampler.S=range(1,0) -> sampler.S=range(1,0): there is no value to sweep over
SWEEP sampler=glob(z*) -> there is no value to sweep over
TRAIN data=digits ~trainer.max_steps -> write trainer.max_steps=null, or the value you mean
TRAIN data=digits ~optim -> write optim=OPTION
evaluate experiment=table_digits checkpoint=tiny.ckpt -> the sweep over sampler, sampler.S: it needs -m
TRAIN data=digits output_dir= -> output_dir='' must be a path
SAMPLE checkpoint= -> checkpoint='' must be a path
SAMPLE checkpoint=~/no.ckpt -> no checkpoint /
train compute=cpu -> train.py has no group compute (did you mean trainer=cpu?)
train sampler=ddpm -> did you mean sampler@grid.sampler=ddpm?
train experiment=table1_cifar10 -> not for train.py; allowed here: bedroom
evaluate experiment=table2_reconstruction checkpoint=tiny.ckpt -> not for evaluate.py | table1_celeba
reconstruct -m experiment=table_digits,table2_reconstruction checkpoint=tiny.ckpt -> not for reconstruct.py
TRAIN data=digits ckpt_path=last -> ckpt_path is called checkpoint now; write
import_checkpoint source=PATH -> source is called checkpoint now; write checkpoint=...
import_checkpoint checkpoint=PATH out=x -> out is called output_dir now
export_checkpoint checkpoint=PATH out=x -> out is called output_dir now
evaluate -m experiment=digits_sweep -> experiment=table_digits now

sample checkpoint=nowhere.ckpt -> no checkpoint nowhere.ckpt | scripts/train.py
SWEEP checkpoint=nowhere.ckpt sampler.S=2,3 -> no checkpoint nowhere.ckpt | (2 times)
SAMPLE checkpoint=cut.ckpt -> cut.ckpt | cut short
SAMPLE checkpoint=text -> text cannot be read as a checkpoint
evaluate data=digits -> checkpoint is required | add checkpoint=...
evaluate -m sampler.S=2,3 -> checkpoint is required
TRAIN data=digits checkpoint=tiny.ckpt -> another model | network.ch: 8 and 32 | cannot resume | choose another name
TRAIN data=digits network.channels=3 -> (3, 8, 8) | (1, 8, 8) | to the data
EVALUATE FOLDER data.size=[16,16] data.root=large metric=pixels -> (1, 8, 8) | (1, 16, 16) \
    | choose the data the model was trained on
EVALUATE FOLDER data.root=colour data.channels=3 metric=pixels -> (1, 8, 8) | (3, 8, 8) | choose the data
EVALUATE FOLDER data.root=large -> 0.png is 16 x 16 | data.size=[8, 8] | data.resize=true
TRAIN FOLDER data.root=large -> is 16 x 16 | data.resize=true
TRAIN FOLDER data.root=colour -> in colour | set data.channels=3
TRAIN FOLDER data.root=empty -> empty holds no images | .png
TRAIN FOLDER data.root=no -> no does not exist | data.root
TRAIN FOLDER data.root=mixed -> mixed/notes.txt | move them away
TRAIN FOLDER -> data.root is required | add data.root=...
SAMPLE output_dir=text/out -> cannot write to text/out | output_dir=
EVALUATE output_dir=text/out -> cannot write to | output_dir=
TRAIN data=digits output_dir=text/out -> cannot write to | output_dir=

import_checkpoint -> give either checkpoint=PATH or download=NAME | ema_cifar10
import_checkpoint checkpoint=flat.ckpt download=ema_cifar10 -> give either checkpoint=PATH or download=NAME
import_checkpoint checkpoint=flat.ckpt preset=cifar -> unknown preset 'cifar' | did you mean cifar10? \
    | allowed: cifar10, celeba, lsun
IMPORT preset=lsun -> either preset or network
import_checkpoint download=ema_cifar -> unknown download 'ema_cifar' | did you mean ema_cifar10?
import_checkpoint checkpoint=nowhere.ckpt -> nowhere.ckpt
IMPORT layout=offical -> layout='offical' | did you mean official?
IMPORT layout=official -> the layout flat, not official
IMPORT weights=mean -> weights='mean' | auto, ema, online
import_checkpoint chekpoint=flat.ckpt -> unknown key chekpoint | did you mean checkpoint?
import_checkpoint checkpoint=flat.ckpt network=unet_digit -> network=unet_digit | did you mean unet_digits?
import_checkpoint checkpoint=flat.ckpt network=unet_digits -> network.image_size
IMPORT network.chh=3 -> unknown key network.chh | did you mean network.ch?
IMPORT network.ch=wide -> network.ch='wide' | an integer
IMPORT network.ch=32 -> flat.ckpt do not fit the given network | of the wrong shape | instead of (32,
import_checkpoint checkpoint=flat.ckpt -> do not fit the nearest, preset | missing
IMPORT schedule=custom -> schedule.betas is required
import_checkpoint checkpoint=text -> text cannot be read as a checkpoint
import_checkpoint checkpoint=evil.ckpt -> it needs code to load (OS.system)
import_checkpoint checkpoint=empty -> empty holds nothing | diffusion_pytorch_model
IMPORT output_dir=. name=m -> m.safetensors exists already | overwrite=true
IMPORT output_dir=text -> text
IMPORT output_dir=. name=dir overwrite=true -> dir.safetensors

metrics -> give images=PATH | out=FILE.npz
METRICS images=mixed -> mixed holds 1 files that are not images
METRICS images=large -> (1, 16, 16), digits has (1, 8, 8) | resize=true
reproduce -> key is required
reproduce 0123456789abcdef -> no .jsonl file under outputs, docs/results has the record 0123456789abcdef
reproduce 12345678901234 empty -> key='12345678901234' must be the 16 hexadecimal digits

export_checkpoint output_dir=x -> checkpoint is required
export_checkpoint checkpoint=m.safetensors -> output_dir is required
EXPORT checkpoint=nowhere.ckpt -> there is no checkpoint nowhere.ckpt
EXPORT checkpoint=flat.ckpt -> flat.ckpt is not a checkpoint | import_checkpoint.py
EXPORT layout=flatt -> layout='flatt' | did you mean flat?
EXPORT layout=flat records=text -> layout=flat has no model card
EXPORT records=nowhere.jsonl -> there is no records file nowhere.jsonl
EXPORT records=none.jsonl -> none.jsonl has no record of these weights | evaluate them first
EXPORT records=text -> text, line 1, is damaged
EXPORT weights=online -> holds ema weights only
EXPORT output_dir=. layout=flat -> model.pt exists already | overwrite=true
EXPORT output_dir=text -> text
"""
ROWS = [row.split(" -> ") for row in re.sub(r"\\\n\s*", "", MISTAKES).replace("OS.", f"{os.name}.").splitlines() if row]


def words(command: str) -> list[str]:
    """Return script and arguments of a command."""
    return " ".join(SHORT.get(word, word) for word in command.split()).split()


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A folder with everything that the mistakes need."""
    folder = tmp_path_factory.mktemp("template")
    for name in ("large", "colour", "mixed", "empty", "dir.safetensors"):
        (folder / name).mkdir()
    for name, mode, side in (("large", "L", 16), ("colour", "RGB", 8), ("mixed", "L", 8)):
        for i in range(3):
            Image.new(mode, (side, side)).save(folder / name / f"{i}.png")
    (folder / "mixed" / "notes.txt").write_text("not an image")
    (folder / "text").write_text("no checkpoint\n")
    for name in ("none.jsonl", "model.pt"):
        (folder / name).touch()
    content = make_checkpoint(folder / "tiny.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(content[: len(content) // 2])
    torch.save(weights(SPEC), folder / "flat.ckpt")
    model = StoredModel(ModelSpec("unet", SPEC, linear_schedule()), weights(SPEC), "ema", None)
    save_model(model, folder / "m.safetensors")
    zero_snr = ModelSpec("unet", SPEC, zero_terminal_snr(linear_schedule()))
    save_model(StoredModel(zero_snr, weights(SPEC), "ema", None), folder / "zero_snr.safetensors")
    network = CategoricalUNetSpec(**dataclasses.asdict(SPEC), categories=3)
    categorical = ModelSpec("categorical_unet", network, linear_schedule(), "x0")
    state = build_network("categorical_unet", network).state_dict()
    save_model(StoredModel(categorical, state, "ema", None), folder / "categorical.safetensors")
    torch.save({"a": Evil()}, folder / "evil.ckpt")
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """The working folder of a command."""
    return shutil.copytree(template, tmp_path, dirs_exist_ok=True)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file, and None for a folder; without those that Hydra makes, and without a lock."""
    left_out = {one for path in folder.rglob("hydra") for one in (path, *path.parents, *path.rglob("*"))}
    left_out |= {*folder.rglob(".lock")}
    return {str(path): path.read_bytes() if path.is_file() else None for path in {*folder.rglob("*")} - left_out}


@pytest.mark.parametrize(("command", "expected"), ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake_is_one_clear_line(command: str, expected: str, run: Run, folder: Path) -> None:
    before = tree(folder)
    outcome = run(*words(command))
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert [phrase for phrase in expected.split(" | ") if phrase not in line] == []
    assert "weights_only" not in line  # torch advises to turn the safe loader off
    assert "Traceback" not in outcome.out
    assert outcome.out == "" or "_checkpoint" not in command
    after = tree(folder)
    if command.startswith("TRAIN"):
        after.pop(str(folder / "out" / "checkpoints"), None)  # an empty folder, to see whether it can be written to
    assert after == before


def test_each_mistake_of_a_sweep_is_one_line(run: Run, folder: Path) -> None:
    outcome = run(*words("SWEEP sampler.S=0,2000"))
    assert outcome.code == 2
    assert [line.split()[:3] for line in outcome.err.splitlines()] == [
        ["error:", "sampler:", "S=0"],
        ["error:", "sampler:", "S=2000"],
    ]


NAMED = ("train experiment=digits", "evaluate checkpoint=x", "figures figure=all checkpoint=x", "import_checkpoint")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((command, "../../x") for command in NAMED),
        *((NAMED[0], name) for name in ("", "..", "../${checkpoint}", "a,../x")),
    ],
)
def test_a_name_is_no_path(command: str, name: str, run: Run, tmp_path: Path) -> None:
    outcome = run(*command.split(), *["-m"] * ("," in name), f"name={name}")
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert "must be a file name without a folder; choose that by output_dir=..." in line
    assert list(tmp_path.iterdir()) == []  # not even Hydra's folder


# The text of an experiment -> what the one line states.
EXPERIMENTS = {
    "name: x": "configs/experiment/mine.yaml: its first line must be '# @package _global_'",
    "# mine\n# @package _global_\nname: x": "its first line must be '# @package _global_'",
    "# @package _global_\ndefaults:\n  - override /schedul: linear": "does not have (did you mean schedule?)",
    "# @package _global_\ndefaults:\n  - override /data: [digits, folder]": "data is null or a list in the experiment",
    "# @package _global_\ndefaults:\n  - override /data: digit": "unknown option data=digit (did you mean digits?)",
    "# @package _global_\nhydra: {swepeer: 1}": "Key 'swepeer' not in 'HydraConf'",
    "# @package _global_\nhydra: {sweeper: {params: {seed: 'range(1,0)'}}}": "there is no value to sweep over",
    "# @package _global_\nnull: 3": "cannot be composed",
    "# @package _global_\nname: [x": "not valid YAML",
    "# @package _global_\nname: a/b": "name='a/b' must be a file name",
    "# @package _global_\ntrianer: {max_steps: 1}": "unknown key trianer (did you mean trainer?)",
}


@pytest.mark.parametrize("text", EXPERIMENTS)
def test_a_wrong_experiment_is_one_clear_line(text: str, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(Path(__file__).parents[2] / "configs", configs)
    for module in ("_cli", "_jobs", "_messages", "_overrides"):
        monkeypatch.setattr(f"{module}.CONFIGS", configs)
    (configs / "experiment" / "mine.yaml").write_text(text)
    outcome = run("train", "experiment=mine")
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert EXPERIMENTS[text] in line


def test_a_full_disk_is_named_before_the_first_job(run: Run, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hydra.core.utils._save_config", full)
    outcome = run("train", "experiment=digits")
    assert (outcome.code, outcome.err) == (
        2,
        "error: cannot write to the folder of the run (No space left on device); make room.\n",
    )


def test_the_home_folder_is_known_in_every_path(run: Run, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    shutil.copytree(folder / "large", folder / "home" / "images")
    (folder / "tiny.ckpt").rename(folder / "home" / "tiny.ckpt")
    outcome = run(*words("SAMPLE checkpoint=~/tiny.ckpt output_dir='~/out' sampler.S=2"))
    assert (outcome.code, outcome.err) == (0, "")
    assert (folder / "home" / "out" / "grid.png").exists()
    assert not (folder / "~").exists()
    assert (folder / "home" / "out" / "hydra").exists()


def test_a_process_prints_one_line_and_leaves_no_file(process: Run, folder: Path) -> None:
    (folder / "newer.ckpt").write_bytes(pickle.dumps({"a": Evil()}, 4))
    before = tree(folder)
    outcome = process("sample", "checkpoint=tiny.ckpt", "sampler.S=2000", "output_dir=out", cwd=folder)
    expected = "error: sampler: S=2000 steps cannot be chosen from T=50 times; S must lie in 1..50.\n"
    assert outcome == (2, "", expected)
    outcome = process("import_checkpoint", "checkpoint=newer.ckpt", cwd=folder)
    assert (outcome.code, outcome.out) == (2, "")
    [line] = outcome.err.splitlines()
    assert line.startswith("error: newer.ckpt")
    assert tree(folder) == before
