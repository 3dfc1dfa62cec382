"""Time training and sampling of our code, the official implementation, diffusers and denoising-diffusion-pytorch.

    python scripts/benchmark/speed.py --official PATH
    python scripts/benchmark/speed.py --official PATH --parts sampling --batch 4 16 --settings default best
    python scripts/benchmark/speed.py --baselines ours --parts training_options        # Lightning, a plain loop, Adam
    python scripts/benchmark/speed.py --network tiny --minutes 1                       # to try the command
    python scripts/benchmark/speed.py --table outputs/benchmark/speed.jsonl            # the tables of a record

PATH is a checkout of ermongroup/ddim. All have the CIFAR-10 network of 35.7 M parameters, on the accelerator if there
is one. First the outputs on the same weights are compared. Rounds are interleaved: each times every variant once. A
setting is `default`, `best`, or words of bf16, channels_last, compile, graphs and winograd (ours only) joined by +;
`best` is bf16+channels_last+compile where bf16 is faster than float32 here, elsewhere channels_last+compile, and for
ours channels_last+winograd.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm
import torch
from baselines import BASELINES, build_baselines, output_differences
from parts import PARTS, Bench
from tables import markdown
from timing import machine, this_device, words

from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.config import choose
from ddim.errors import UserError
from ddim.networks import UNetSpec
from ddim.results.records import RecordFile

TINY = UNetSpec((8, 8), ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
NETWORKS = {"cifar10": PRESETS["cifar10"], "tiny": TINY}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--official", metavar="PATH", help="checkout of ermongroup/ddim")
    add("--path", nargs="*", default=[], metavar="FOLDER", help="folders with further packages, such as diffusers")
    add("--baselines", nargs="+", default=list(BASELINES), metavar="NAME", help=", ".join(BASELINES))
    add("--settings", nargs="+", default=["default", "best"], metavar="NAME")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    add("--batch", nargs="+", type=int, help="batch sizes of sampling; default 500 and 64, on a CPU 4")
    add("--train-batch", type=int, help="images in a training step; default 128, on a CPU 8")
    add("--steps", type=int, default=10, help="S, the steps of sampling; divides 1000")
    add("--rounds", type=int, default=5, help="at most; fewer when the time is up")
    add("--minutes", type=float, default=9.0, help="for everything")
    add("--threads", type=int, help="of the CPU")
    add("--network", choices=NETWORKS, default="cifar10")
    add("--out", type=Path, default=Path("outputs/benchmark/speed.jsonl"), help="the record; lines are appended")
    add("--table", type=Path, metavar="RECORD", help="only print the tables of a record")
    return parser.parse_args()


def main() -> None:
    """Measure, append to the record, and print its tables."""
    options = arguments()
    sys.path[:0] = options.path
    try:
        run = None if options.table else measure(options)
        path = options.table or options.out
        records = [record for record in RecordFile(path).read() if run in (None, record["run"])]
        if not records:
            raise UserError(f"{path} holds no records; make them with scripts/benchmark/speed.py --out {path}.")
        print(f"\n{markdown(records)}\n\n{path}")
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> str:
    """Measure the parts; return the name of the run, which all of its lines in the record have."""
    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads or torch.get_num_threads())
    for name in options.baselines:
        choose("baseline", name, BASELINES)
    for setting in set(options.settings) - {"best"}:
        words(setting)
    device = this_device()
    on_cpu = device.type == "cpu"
    common = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), **machine(device), "network": options.network}
    file = RecordFile(options.out)

    def write(what: str, **fields: Any) -> None:
        file.append({**common, "what": what, **fields})

    baselines, missing = build_baselines(options.baselines, NETWORKS[options.network], options.official)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", flush=True)
    differences = output_differences(baselines)
    print("the same output on the same weights:", differences or "nothing to compare", flush=True)
    batches, train_batch = (
        options.batch or ([4] if on_cpu else [500, 64]),
        options.train_batch or (8 if on_cpu else 128),
    )
    bench = Bench(baselines, [], device, batches, train_batch, options.steps, options.rounds, write)
    bench.describe(missing, differences)
    bench.choose_settings(options.settings, 1024 if on_cpu else 8192)
    for i, name in enumerate(options.parts):
        measure_part, share = PARTS[name]
        minutes = (end - time.monotonic()) / 60 * share / sum(PARTS[later][1] for later in options.parts[i:])
        print(f"\n{name}: {minutes:.1f} minutes", flush=True)
        try:
            if minutes <= 0:
                raise UserError(f"no time left of {options.minutes:g} minutes")
            measure_part(bench, minutes)
        except UserError as error:  # such as a setting that this device does not have
            write("missing", peer=name, reason=str(error))
    return str(common["run"])


if __name__ == "__main__":
    main()
