"""Check on a GPU that results are right, and measure how fast they come.

    python scripts/gpu/acceptance.py --official PATH          # twenty minutes; PATH: a checkout of ermongroup/ddim
    python scripts/gpu/acceptance.py --parts training         # minutes of CIFAR-10, then a table over S and η
    python scripts/gpu/acceptance.py --rehearsal --parts checks speed training       # tiny sizes, on a CPU

checks: the tests marked gpu, the commands on the digits (with --kit or before a training part: where the time of a
training step goes), the tests that compile, then such steps in CUDA graphs. speed: scripts/benchmark/speed.py next to
the official code and diffusers. training: the CIFAR-10 network for as long as there is time, as a model file in
float16; of the model a sweep over S and η, figures, solvers, the averages and precision. All goes into a new folder:
summary.txt, record.jsonl (each stage and check), log.txt, speed.jsonl, and what the commands wrote. A run ends up to 30
s after --minutes, with exit status 1 if a stage was not ok. For a machine without a network: scripts/gpu/pack.py.
Python's standard library is enough to start this.

One after the other: of eight processes that compile at once on 16 cores, none finishes in two minutes.
"""

import argparse
import hashlib
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
from pathlib import Path
from xml.etree import ElementTree

import plan
from stages import ROOT, Stages

PARTS = ("checks", "speed", "training")
BASELINES = ("ours", "official", "diffusers")
PART = 15 << 20  # bytes of a file that leaves a lent machine
MODEL = 3 * PART  # bytes of a model file that leaves it: else the results might not
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
    add("--train", nargs="+", default=[], metavar="KEY=VALUE", help="of training: for train.py, such as network.ch=64")
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
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.work / "compiled")  # shared by all stages
        environment["DDIM_GPU"] = "cpu" if self.tiny else "cuda"
        if self.tiny:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.stages = Stages(self.out, 60 * options.minutes, environment, self.keep)
        self.compute = [f"compute.{word}" for word in (plan.CPU_COMPUTE if self.tiny else plan.COMPUTE).split()]
        self.trainer = [f"trainer.{word}" for word in (plan.CPU_TRAINER if self.tiny else plan.TRAINER).split()]

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
        images, wheels = self.work / "images", sorted(kit.glob("wheels/*.whl"))
        site = self.work / "site" / hashlib.sha256(" ".join(path.name for path in wheels).encode()).hexdigest()[:8]
        self.work.mkdir(parents=True, exist_ok=True)
        if not site.exists():
            pip = "-m pip install --quiet --no-index --no-deps --no-compile --target"
            if self.python("install", 90, pip, partial_folder(site), *wheels):
                partial_folder(site).rename(site)
        self.stages.environment["PYTHONPATH"] += os.pathsep + str(site)
        if (kit / "images.zip").exists() and not images.exists():
            with zipfile.ZipFile(kit / "images.zip") as archive:
                archive.extractall(partial_folder(images))
            partial_folder(images).rename(images)
        self.images = self.images or (images if images.exists() else None)
        self.official = self.official or (kit / "official" if (kit / "official").exists() else None)
        # Records ask git for the commit, and the checkout may have come without, or with an older one.
        if (kit / "git").exists():
            git = {"GIT_DIR": str(kit / "git"), "GIT_WORK_TREE": str(ROOT)}
            # Files of another user are refused otherwise.
            git |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
            self.stages.environment |= git
            # A file that was left behind, such as a model that ships, is no change.
            absent = "git ls-files --deleted -z | git update-index -z --skip-worktree --stdin"
            self.stages.run("git", 30, "sh", "-c", f"git read-tree HEAD && {absent}")

    def checks(self) -> None:
        """Run what checks. What compiles comes late, since each takes half a minute or more."""
        end = time.monotonic() + self.stages.left * (0.5 if len(self.options.parts) > 1 else 1)
        self.tests("gpu-tests", end - time.monotonic(), f"not ({plan.COMPILES})")
        if followed := bool(self.options.kit or "training" in self.options.parts):  # which has these commands too
            self.profile("profile", min(plan.PROFILE, end - time.monotonic()), "trainer.profiler=kernels")
        else:
            self.commands(end - time.monotonic())
        if not self.tiny:
            self.tests("compile-tests", end - time.monotonic(), plan.COMPILES)
            if followed:
                self.profile("profile-graphs", end - time.monotonic(), "trainer.graphs=true")

    def profile(self, name: str, limit: float, word: str) -> None:
        """Show where the time of a training step goes; what this compiles, the training part finds."""
        run = self.work / "cifar10" / name
        shutil.rmtree(run, ignore_errors=True)  # of an earlier call
        self.train(name, limit, run, f"trainer.max_steps={40 if self.tiny else 200}", word)

    def tests(self, name: str, limit: float, which: str) -> None:
        """Run tests marked gpu; take what they measured into the record."""
        spread = ["-n", "4"] if importlib.util.find_spec("xdist") and not self.tiny else []
        pytest = "-m pytest -q -p no:cacheprovider -W default"  # other versions' warnings are no failures here
        junit = self.out / f"{name}.xml"
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        files = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
        words: list[str | Path] = ["-v", "--continue-on-collection-errors", "-m", "gpu", "-k", which, *files, *spread]
        self.python(name, limit, pytest, *words, f"--junitxml={junit}", "-o", "junit_family=xunit1")
        if junit.exists():
            self.read_checks(junit)

    def commands(self, limit: float) -> None:
        """Train, evaluate and sample by the command line, on the digits."""
        run, end = self.work / "digits", time.monotonic() + limit
        checkpoint = f"checkpoint={run}/checkpoints/last.ckpt"
        steps, n = ("10", "20") if self.tiny else ("500", "500")
        eager, compute = "trainer.compile=false", [*self.compute, "compute.compile=false"]
        train = ["experiment=digits", *self.trainer, eager, f"trainer.max_steps={steps}", "eval.every=0"]
        if self.python("train-digits", limit, "scripts/train.py", *train, f"output_dir={run}", "checkpoint=last"):
            sweep = ["-m", "experiment=table_digits", checkpoint, f"n={n}", "sampler.S=5,10", f"output_dir={run}/table"]
            sweep.append(f"reference_dir={self.work}/reference")
            self.python("evaluate-digits", end - time.monotonic(), "scripts/evaluate.py", *sweep, *compute)
            grid = [checkpoint, "n=16", f"output_dir={run}/samples", "overwrite=true", *compute]
            self.python("sample-digits", end - time.monotonic(), "scripts/sample.py", *grid)

    def speed(self) -> None:
        """Time sampling and training beside the others, and say the tables."""
        seconds = self.stages.left - 40  # its clock begins when it has been imported
        if "training" in self.options.parts:
            seconds /= 2
        benchmark, out = "scripts/benchmark/speed.py", self.out / "speed.jsonl"
        words = ["--baselines", *BASELINES, "--minutes", f"{seconds / 60:.3f}", "--out", str(out)]
        words += ["--official", str(self.official.resolve())] if self.official else []
        tiny = "--network tiny --settings default --batch 4 --train-batch 4 --steps 2 --rounds 1"
        words += (tiny if self.tiny else "--batch 500 --train-batch 128").split()
        words += ["--parts", "training"] if seconds < 240 and not self.tiny else []  # an H100's sampling is measured
        limit = seconds + 60 if seconds > 30 or self.tiny else 0  # it ends by itself, unless it hangs; 0: left out
        self.python("speed", limit, benchmark, *words)
        if out.exists():
            table = self.capture(benchmark, "--table", str(out))
            self.stages.say(table.stdout.rstrip())

    def train(self, name: str, limit: float, run: Path, *words: str, endless: bool = False) -> bool:
        """Train on the images."""
        experiment, data = self.data()
        recipe = plan.TINY_RECIPE if self.tiny else plan.RECIPE
        train = [f"experiment={experiment}", *data, *self.trainer, *recipe.split()]
        train += ["grid.every=0", "eval.every=0", "name=gpu", f"output_dir={run}", *self.options.train, *words]
        return self.python(name, limit, "scripts/train.py", *train, endless=endless)

    def data(self) -> tuple[str, list[str]]:
        """Return the experiment that is trained, and the words that name its data."""
        if self.images:
            return "cifar10", ["data=folder", f"data.root={self.images.resolve()}", "data.size=[32,32]"]
        return ("digits", ["data=digits"]) if self.tiny else ("cifar10", ["data=cifar10"])

    def training(self) -> None:
        """Train, then measure samples by S and η, draw figures, and measure what else there is time for."""
        run, tiny = self.work / "cifar10", self.tiny
        limit = self.stages.left - (0 if tiny else plan.LATER)
        self.train("train", limit, run, "checkpoint=last", endless=True)
        last = run / "checkpoints" / "last.ckpt"
        if not last.exists():
            self.stages.failed.append("train: no checkpoint")
            return
        export = [f"checkpoint={last}", f"output_dir={run}/model", "layout=safetensors", "dtype=float16"]
        if not self.python("export", 60, "scripts/export_checkpoint.py", *export, "overwrite=true"):
            return
        model = run / "model" / "model.safetensors"
        if self.options.kit:
            if (size := model.stat().st_size) <= MODEL:
                self.split(model)
            else:
                self.stages.say(f"    the model file stays: {size >> 20} MiB, and at most {MODEL >> 20} may leave")
        pictures = [f"checkpoint={model}", *self.compute, "compute.compile=false", "overwrite=true", plan.CLIP]
        small = ["n=4", "S=[2,3]", "points=3", "columns=3", "frames=3", "sampler.S=3"] if tiny else []
        figures = [*pictures, "figure=all", f"output_dir={run}/figures", *small]
        grid = [*pictures, *(["n=4", "sampler.S=3"] if tiny else ["n=256", "sampler.S=100"]), f"output_dir={run}/grid"]
        first, *later = sweeps = plan.TINY_SWEEPS if tiny else plan.SWEEPS
        self.sweep(first, model, sweeps[first], self.stages.left - (0 if tiny else plan.FIGURES))
        self.python("figures", 60, "scripts/figures.py", *figures)
        self.python("grid", 60, "scripts/sample.py", *grid, "sampler.spacing=quad")
        for name in later:
            self.sweep(name, last if name == "averages" else model, sweeps[name], self.stages.left)
        size = ["--n", "8", "--steps", "2"] if tiny else ["--n", "1500", "--steps", "20"]
        out = ["--out", run / "precision.jsonl"]
        words = [model, "--extractor", self.metric, *size, *out]
        self.python("precision", 60, "scripts/benchmark/precision.py", *words)

    @property
    def metric(self) -> str:
        """The features that are compared."""
        return "digits_classifier" if self.tiny and not self.images else "efficientnet"

    def sweep(self, name: str, checkpoint: Path, entries: str, limit: float) -> None:
        """Measure samples; what is done when the time is up is in the records."""
        table = self.work / "cifar10" / name
        words = ["-m", f"checkpoint={checkpoint}", *self.data()[1], f"metric={self.metric}", *self.compute]
        words += [*(plan.TINY_SWEEP if self.tiny else plan.SWEEP).split(), "sampler.spacing=quad", "name=gpu"]
        words += [f"output_dir={table}", f"reference_dir={self.work}/reference"]
        self.python(f"sweep-{name}", limit, "scripts/evaluate.py", *words, *entries.split())

    def split(self, path: Path) -> None:
        """Put a file into the results, in parts that may leave a lent machine: `cat` joins them."""
        data = path.read_bytes()
        parts = [self.out / f"{path.name}.{i}" for i in range(-(-len(data) // PART))]
        for i, part in enumerate(parts):
            (self.out / ".part").write_bytes(data[i * PART : (i + 1) * PART])
            (self.out / ".part").replace(part)  # the part of an earlier time is there until then
        for part in set(self.out.glob(f"{path.name}.*")) - set(parts):
            part.unlink()

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

    def keep(self) -> None:
        """Pack what is to leave a lent machine: all that the commands have written so far, but for weights."""
        if not self.options.kit:
            return
        packed = self.work / "results.tar.gz"
        try:
            with tarfile.open(packed, "w:gz") as archive:
                for path in filter(Path.exists, (self.work / "digits", self.work / "cifar10")):
                    archive.add(path, path.name, filter=lambda entry: None if is_large(entry.name) else entry)
            self.split(packed)
        except OSError as error:  # a command has just removed or cut a file, or the disk is full: the next time
            print(f"not packed yet: {error}", flush=True)

    def finish(self) -> None:
        """Say what was not ok and where everything is."""
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
