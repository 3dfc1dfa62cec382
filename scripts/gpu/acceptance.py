"""Check on a GPU that results are right, and measure how fast they come.

    python scripts/gpu/acceptance.py --official PATH          # twenty minutes; PATH: a checkout of ermongroup/ddim
    python scripts/gpu/acceptance.py --parts training         # minutes of CIFAR-10, then a table over S and η
    python scripts/gpu/acceptance.py --rehearsal --parts checks speed training       # tiny sizes, on a CPU

checks: side by side the tests marked gpu, the unit tests of the method and the networks, and the commands on the
digits; meanwhile all that `speed` compiles is compiled, and kept. speed: scripts/benchmark/speed.py next to the
official code and diffusers. training: the CIFAR-10 network for as long as there is time, then a sweep over S and η,
figures and precision. All goes into a new folder: summary.txt, record.jsonl (each stage and check), log.txt,
speed.jsonl, and what the commands wrote. Exit status 1: a stage was not ok. For a machine without a network:
scripts/gpu/pack.py. Python's standard library is enough to start this.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from stages import ROOT, Stages

PARTS = ("checks", "speed", "training")
BASELINES = ("ours", "official", "diffusers")
UNIT = "not gpu and not integration and not slow and not network"
COMPILED = "bf16+channels_last+compile"
# Stated in full: what is checked must not depend on the defaults.
COMPUTE = "device=cuda batch_size=500 bf16=true channels_last=true compile=true graphs=false"
TRAINER = "accelerator=gpu devices=1 precision=bf16-mixed channels_last=true compile=true"
CPU_COMPUTE = "device=cpu batch_size=16 bf16=false channels_last=false compile=false graphs=false winograd=false"
CPU_TRAINER = "accelerator=cpu devices=1 precision=32-true channels_last=false compile=false winograd=false"
# A run of minutes: a large batch and rate, a short warm-up, averages over a ninth of the run, 500 and 100 steps.
RECIPE = (
    "trainer.max_steps=1000000 trainer.batch_size=256 trainer.log_every=50 trainer.checkpoint_every=1000 "
    "trainer.keep_last=1 optim.lr=0.0006 optim.warmup=200 ema.decay=[0.9999,0.998,0.99] ema.warmup=true"
)
TINY_RECIPE = (
    "trainer.max_steps=10 trainer.batch_size=8 trainer.log_every=5 "
    "network.ch=32 network.num_groups=8 network.ch_mult=[1,2] network.num_res_blocks=1"
)
SWEEP, TINY_SWEEP = "n=2000 metric.batch_size=500", "n=20"
# The steps first: all samplers of the smallest S, then of the next, so that there is a table when the time is up.
ENTRIES = "sampler.S=10,20,50 sampler=ddim,ddim_eta05,ddpm,sigma_hat_clamped"
TINY_ENTRIES = "sampler.S=2,3 sampler=ddim,sigma_hat_clamped"
REST = 240  # seconds of the training part for what follows the training
REPORT = 40  # seconds of these for a report, where the sweep is late
# What a record says about the machine.
MACHINE = """
import json, sys, torch
sys.path.insert(0, "scripts/benchmark")
from timing import machine, this_device
gpus, cudnn = torch.cuda.device_count(), torch.backends.cudnn.version()
print(json.dumps({**machine(this_device()), "gpus": gpus, "cudnn": cudnn}))
"""


def main() -> None:
    """Run the parts that are asked for, print the summary, and exit with 1 if a stage was not ok."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped by SIGTERM."))  # ends what runs, as Ctrl-C does
    run = Acceptance(options)
    run.start()
    try:
        for part in PARTS:
            if part in options.parts:
                getattr(run, part)()
    finally:
        run.finish()
    sys.exit(bool(run.stages.failed))


def parse() -> argparse.Namespace:
    """Return the options of the command, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", default=["checks", "speed"], choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    add("--official", type=Path, metavar="PATH", help="checkout of ermongroup/ddim; without it, its rows are missing")
    add("--images", type=Path, metavar="FOLDER", help="of training: 32x32 images; else CIFAR-10 is downloaded")
    add("--minutes", type=float, default=20.0, help="for everything; stages whose time is up are stopped")
    add("--out", type=Path, default=Path("outputs/gpu", time.strftime("%Y-%m-%d_%H-%M-%S")), help="a new folder")
    add("--kit", type=Path, metavar="FOLDER", help="made by scripts/gpu/pack.py, for a machine without a network")
    add("--rehearsal", action="store_true", help="tiny sizes, on the CPU: shows that each command works, no more")
    options = parser.parse_args()
    for name in ("official", "images", "kit"):
        if (path := getattr(options, name)) is not None and not path.is_dir():
            parser.error(f"--{name} {path} is no folder.")
    if options.official and not (options.official / "models" / "diffusion.py").is_file():
        parser.error(f"--official {options.official} is no checkout of ermongroup/ddim.")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g} must be above 0.")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty; name a new folder.")
    return options


class Acceptance:
    """One run.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.tiny, self.started = options, options.rehearsal, time.monotonic()
        self.out = self.work = options.out.resolve()
        if options.kit and not self.tiny:  # few files leave such a machine; what the next call can use stays there
            self.work = Path.home() / ".cache" / "ddim_gpu"
        self.images, self.official = options.images, options.official
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        paths = [str(ROOT), str(self.work / "site"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.work / "compiled")  # shared by all stages
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # of each process, and six compile side by side
        environment["DDIM_GPU"] = "cpu" if self.tiny else "cuda"
        if self.tiny:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.stages = Stages(self.out, 60 * options.minutes, environment)
        self.compute = [f"compute.{word}" for word in (CPU_COMPUTE if self.tiny else COMPUTE).split()]
        self.trainer = [f"trainer.{word}" for word in (CPU_TRAINER if self.tiny else TRAINER).split()]

    def python(self, name: str, limit: float, script: str, *words: str | Path, endless: bool = False) -> bool:
        """Run a script of the repository, or a module, as a stage."""
        return self.stages.run(name, limit, sys.executable, *script.split(), *words, endless=endless)

    def capture(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run Python as no stage, for what it prints."""
        command = [sys.executable, *words]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.stages.environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,  # of one that hangs
        )

    def start(self) -> None:
        """Unpack the kit, if there is one; look at the machine."""
        if self.options.kit:
            self.out.mkdir(parents=True, exist_ok=True)
            self.unpack(self.options.kit.resolve())
        done = self.capture("-c", MACHINE)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            sys.exit(f"error: this Python cannot run the project ({reason}); activate its environment first.")
        self.stages.common = json.loads(done.stdout.splitlines()[-1])
        if not self.tiny and not self.stages.common["gpus"]:
            sys.exit("error: torch sees no CUDA device; --rehearsal tries every command on a CPU.")
        self.out.mkdir(parents=True, exist_ok=True)
        machine = self.stages.common
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        self.stages.say(f"{machine['gpus']} x {machine['device']}, {machine['processor']}, {os.cpu_count()} cores")
        self.stages.say(f"{versions}, cudnn {machine['cudnn']}; code {machine['revision']}")

    def unpack(self, kit: Path) -> None:
        """Install the kit's packages and unpack its images, unless an earlier call did; name its commit."""
        site, images, wheels = self.work / "site", self.work / "images", sorted(kit.glob("wheels/*.whl"))
        self.work.mkdir(parents=True, exist_ok=True)
        if not site.exists():
            pip = "-m pip install --quiet --no-index --no-deps --no-compile --target"
            if self.python("install", 90, pip, partial_folder(site), *wheels):
                partial_folder(site).rename(site)
        if (kit / "images.zip").exists() and not images.exists():
            with zipfile.ZipFile(kit / "images.zip") as archive:
                archive.extractall(partial_folder(images))
            partial_folder(images).rename(images)
        self.images = self.images or (images if images.exists() else None)
        self.official = self.official or (kit / "official" if (kit / "official").exists() else None)
        if not (ROOT / ".git").exists():  # the checkout came without; records ask git for the commit
            git = {"GIT_DIR": str(kit / "git"), "GIT_WORK_TREE": str(ROOT)}
            # Files of another user are refused otherwise.
            git |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
            self.stages.environment |= git
            self.stages.run("git", 30, "git", "read-tree", "HEAD")

    def checks(self) -> None:
        """Run what checks, side by side: a check needs a fraction of the GPU, and compiling needs cores."""
        limit = self.stages.left * (0.45 if len(self.options.parts) > 1 else 1)
        spread = ["-n", "4"] if importlib.util.find_spec("xdist") and not self.tiny else []
        pytest = "-m pytest -q -p no:cacheprovider -W default"  # other versions' warnings are no failures here
        junit = self.out / "gpu_tests.xml"
        tests = sorted((ROOT / "tests").rglob("test_*.py"))
        with_gpu = [path for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]
        gpu_tests: list[str | Path] = ["-v", "--continue-on-collection-errors", "-m", "gpu", *with_gpu, *spread]
        gpu_tests += [f"--junitxml={junit}", "-o", "junit_family=xunit1"]
        files = ["tests/diffusion/test_schedule.py"] if self.tiny else ["tests/diffusion", "tests/networks"]
        if self.tiny:
            gpu_tests += ["-k", "not compile"]  # takes minutes on a CPU
        calls: list[Callable[[], object]] = [
            partial(self.python, "gpu-tests", limit, pytest, *gpu_tests),
            partial(self.python, "unit-tests", limit, pytest, "-m", UNIT, *files, *spread),
            partial(self.commands, limit),
        ]
        if "speed" in self.options.parts and not self.tiny:
            parts = ("sampling", "training")
            calls += [partial(self.compile, name, part, limit) for name in BASELINES for part in parts]
        self.stages.together(*calls)
        if junit.exists():
            self.read_checks(junit)

    def commands(self, limit: float) -> None:
        """Train, evaluate and sample by the command line, on the digits."""
        run, end = self.work / "digits", time.monotonic() + limit
        checkpoint = f"checkpoint={run}/checkpoints/last.ckpt"
        steps, n = ("10", "20") if self.tiny else ("500", "500")
        train = ["experiment=digits", *self.trainer, f"trainer.max_steps={steps}", "eval.every=0", f"output_dir={run}"]
        if self.python("train-digits", limit, "scripts/train.py", *train, "checkpoint=last"):
            sweep = ["-m", "experiment=table_digits", checkpoint, f"n={n}", "sampler.S=5,10", f"output_dir={run}/table"]
            sweep.append(f"reference_dir={self.work}/reference")
            self.python("evaluate-digits", end - time.monotonic(), "scripts/evaluate.py", *sweep, *self.compute)
            grid = [checkpoint, "n=16", f"output_dir={run}/samples", "overwrite=true", *self.compute]
            self.python("sample-digits", end - time.monotonic(), "scripts/sample.py", *grid)

    def benchmark(self, baselines: tuple[str, ...], seconds: float, out: Path) -> list[str]:
        """Return the words of a call of the benchmark."""
        words = ["--baselines", *baselines, "--minutes", f"{seconds / 60:.3f}", "--out", str(out)]
        words += ["--official", str(self.official.resolve())] if self.official else []
        tiny = "--network tiny --settings default --batch 4 --train-batch 4 --steps 2 --rounds 1"
        return words + (tiny if self.tiny else "--batch 500 --train-batch 128").split()

    def compile(self, name: str, part: str, limit: float) -> None:
        """Compile what the benchmark is going to time; torch keeps it."""
        if name != "official" or self.official:
            stage = f"compile-{name}-{part}"
            words = [*self.benchmark((name,), limit, self.work / f"{stage}.jsonl"), "--settings", COMPILED]
            self.python(stage, limit, "scripts/benchmark/speed.py", *words, "--parts", part)

    def speed(self) -> None:
        """Time sampling and training beside the others, and say the tables."""
        seconds = self.stages.left - 40  # its clock begins when it has been imported
        if "training" in self.options.parts:
            seconds /= 2
        parts = ["--parts", "sampling"] if seconds < 240 and not self.tiny else []
        out = self.out / "speed.jsonl"
        benchmark = "scripts/benchmark/speed.py"
        # The limit is for one that hangs: the benchmark ends by itself.
        self.python("speed", seconds + 60, benchmark, *self.benchmark(BASELINES, seconds, out), *parts)
        if out.exists():
            table = self.capture(benchmark, "--table", str(out))
            self.stages.say(table.stdout.rstrip())

    def training(self) -> None:
        """Train, then measure samples by S and η, draw figures, and compare precisions."""
        run, tiny, digits = self.work / "cifar10", self.tiny, self.tiny and not self.images
        experiment, metric = ("digits", "digits_classifier") if digits else ("cifar10", "efficientnet")
        data = [f"data={experiment}"]
        if self.images:
            data = ["data=folder", f"data.root={self.images.resolve()}", "data.size=[32,32]"]
        train = [f"experiment={experiment}", *data, *self.trainer, *(TINY_RECIPE if tiny else RECIPE).split()]
        train += ["grid.every=0", "eval.every=0", "name=gpu", f"output_dir={run}", "checkpoint=last"]
        limit = self.stages.left - (0 if tiny else REST)
        self.python("train", limit, "scripts/train.py", *train, endless=True)
        last = run / "checkpoints" / "last.ckpt"
        if not last.exists():
            self.stages.failed.append("train: no checkpoint")
            return
        sweep = ["-m", f"checkpoint={last}", *data, f"metric={metric}", *(TINY_SWEEP if tiny else SWEEP).split()]
        sweep += [*self.compute, "sampler.spacing=quadratic", "name=gpu", f"output_dir={run}/table"]
        sweep.append(f"reference_dir={self.work}/reference")
        pictures = [f"checkpoint={last}", *self.compute, "compute.compile=false", "overwrite=true"]
        small = ["n=4", "S=[2,3]", "points=3", "columns=3", "frames=3", "sampler.S=3"] if tiny else []
        figures = [*pictures, "figure=all", f"output_dir={run}/figures", *small]
        grid = ["n=4", "sampler.S=3"] if tiny else ["n=64", "sampler.S=50", "sampler.spacing=quadratic"]
        grids = [
            partial(self.python, f"grid-{weights}", 50, "scripts/sample.py", *pictures, *grid, f"weights={weights}", to)
            for weights, to in (("ema", f"output_dir={run}/ema"), ("online", f"output_dir={run}/online"))
        ]
        self.stages.together(partial(self.python, "figures", 50, "scripts/figures.py", *figures), *grids)
        precision = [last, "--extractor", metric, "--n", "8" if tiny else "1500", "--steps", "2" if tiny else "20"]
        out = ["--out", self.out / "precision.jsonl"]
        self.python("precision", 60, "scripts/benchmark/precision.py", *precision, *out)
        entries = (TINY_ENTRIES if tiny else ENTRIES).split()
        if not self.python("evaluate", self.stages.left - REPORT, "scripts/evaluate.py", *sweep, *entries):
            # The first entry is there, so nothing is computed; the report is of all records that are.
            first = [word.partition(",")[0] for word in entries]
            self.python("report", REPORT, "scripts/evaluate.py", *sweep, *first)

    def read_checks(self, junit: Path) -> None:
        """Take each test on the GPU and what it measured into the record; say the numbers."""
        for case in ElementTree.parse(junit).iter("testcase"):
            outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            numbers = {str(p.get("name")): float(p.get("value", "nan")) for p in case.iter("property")}
            self.stages.record(what="check", test=case.get("name"), outcome=outcome, numbers=numbers)
            for what, number in numbers.items():
                self.stages.say(f"    {number:8.1e}  {what}: {case.get('name')}")
            if outcome in ("failure", "error"):
                self.stages.say(f"    {outcome}: {case.get('classname')}.{case.get('name')}")

    def finish(self) -> None:
        """Say what was not ok and where everything is; pack what is to leave a lent machine."""
        if self.options.kit:
            with tarfile.open(self.out / "results.tar.gz", "w:gz") as archive:
                for path in filter(Path.exists, (self.work / "digits", self.work / "cifar10")):
                    archive.add(path, path.name, filter=lambda entry: None if is_large(entry.name) else entry)
            run = self.work / "cifar10"  # as files too: an archive that is too large stays there
            for path in (run / "table" / "table.md", run / "table" / "records.jsonl", *run.glob("*/grid.png")):
                if path.exists():
                    shutil.copy(path, self.out / f"cifar10_{path.parent.name}_{path.name}")
        failed, seconds = ", ".join(self.stages.failed), time.monotonic() - self.started
        self.stages.say(f"{f'not ok: {failed}' if failed else 'every stage ok'}, {seconds:.0f} s: {self.out}")


def is_large(name: str) -> bool:
    """Return whether a file is left on the machine: weights, tensors, and features of an unfinished evaluation."""
    return name.endswith((".ckpt", ".safetensors")) or "/unfinished/" in name


def partial_folder(folder: Path) -> Path:
    """Return where a folder is made before it gets its name, so that a half of one is never taken for it."""
    return folder.with_name(f"{folder.name}.partial")


if __name__ == "__main__":
    main()
