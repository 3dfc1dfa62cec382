"""Time training and sampling of ours, of the official implementation, of diffusers and of denoising-diffusion-pytorch.

    python scripts/benchmark.py --official PATH
    python scripts/benchmark.py --official PATH --parts sampling --batch 4 16 --settings default best
    python scripts/benchmark.py --network tiny --minutes 1                      # to try the command
    python scripts/benchmark.py --table outputs/benchmark/speed.jsonl           # the tables of a record

PATH is a checkout of ermongroup/ddim. All have the CIFAR-10 network of 35.7 M parameters, on the accelerator if there
is one. First the outputs of all on the same weights are compared, so that the same work is timed. Rounds are
interleaved: each of them times every variant once. A setting is `default`, `best`, or words of bf16, channels_last,
compile, graphs and winograd (ours only) joined by +; `best` is bf16+channels_last+compile where this machine
multiplies bf16 faster than float32, elsewhere channels_last+compile, and for ours channels_last+winograd.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm

PARTS = {"sampling": 4.0, "training": 4.0, "scaling": 1.0, "steps": 1.0, "profile": 1.0}  # shares of the time
NETWORKS = ("cifar10", "tiny")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--official", metavar="PATH", help="checkout of ermongroup/ddim")
    add("--path", nargs="*", default=[], metavar="FOLDER", help="folders that hold further packages, such as a peer's")
    add("--peers", nargs="+", default=["ours", "official", "diffusers", "ddpm_pytorch"], metavar="NAME")
    add("--settings", nargs="+", default=["default", "best"], metavar="NAME")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    add("--batch", nargs="+", type=int, help="batch sizes of sampling; default 64 and 500, on a CPU 4")
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
    """Measure, append the record, and print its tables."""
    options = arguments()
    sys.path[:0] = options.path
    from ddim.errors import UserError

    try:
        if options.table is None:
            run = measure(options)
            print(f"\n{tables(options.out, run)}\n{options.out}")
        else:
            print(tables(options.table))
    except UserError as error:
        sys.exit(f"error: {error}")


def tables(path: Path, run: str | None = None) -> str:
    """Return the tables of a record, of one run or of all."""
    from _benchmark_table import markdown

    from ddim.errors import UserError
    from ddim.results.records import RecordFile

    records = [record for record in RecordFile(path).read() if run in (None, record["run"])]
    if not records:
        raise UserError(f"{path} holds no records; make them with scripts/benchmark.py --out {path}.")
    return markdown(records)


def measure(options: argparse.Namespace) -> str:
    """Do what the command line says; return the name of the run, which all of its lines in the record carry."""
    import torch
    from _benchmark import machine, this_device
    from _benchmark_parts import MEASURES, Bench, add_ceiling, resolve
    from _peers import PEERS, build_peers, check_same_work

    from ddim.checkpoints.convert.model_zoo import PRESETS
    from ddim.config import choose
    from ddim.errors import UserError
    from ddim.networks import UNetSpec
    from ddim.results.records import RecordFile

    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = this_device()
    tiny = UNetSpec((8, 8), ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
    spec = PRESETS["cifar10"] if options.network == "cifar10" else tiny
    for name in options.peers:
        choose("peer", name, PEERS)
    peers, missing = build_peers(options.peers, spec, options.official)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", flush=True)
    shape = (spec.channels, *spec.image_size)
    apart = check_same_work(peers, shape)
    print("the same output on the same weights:", apart or "nothing to compare", flush=True)

    run = time.strftime("%Y-%m-%dT%H:%M:%S")
    file, common = RecordFile(options.out), {"run": run, **machine(device)}

    def write(what: str, **fields: Any) -> None:
        file.append({**common, "what": what, "network": options.network, **fields})

    on_cpu = device.type == "cpu"
    bench = Bench(
        peers=peers,
        settings=[],
        device=device,
        sampling_batches=options.batch or ([4] if on_cpu else [500, 64]),
        training_batch=options.train_batch or (8 if on_cpu else 128),
        S=options.steps,
        rounds=options.rounds,
        write=write,
    )
    bench.describe(missing, apart)
    ceiling = add_ceiling(bench, 1024 if on_cpu else 8192)
    bench.settings += resolve(options.settings, ceiling)
    left = {name: PARTS[name] for name in options.parts}
    for name in options.parts:
        minutes = (end - time.monotonic()) / 60 * left[name] / sum(left.values())
        del left[name]
        measure_part: Callable[[Bench, float], None] = MEASURES[name]
        print(f"\n{name}: {minutes:.1f} minutes", flush=True)
        try:
            if minutes <= 0:
                raise UserError(f"no time left of {options.minutes:g} minutes")
            measure_part(bench, minutes)
        except UserError as error:  # such as a setting that this device has not
            bench.write("missing", peer=name, reason=str(error))
    return run


if __name__ == "__main__":
    main()
