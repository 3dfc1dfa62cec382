"""Evaluate a checkpoint: once, or with -m a sweep over numbers of steps and samplers.

    python scripts/evaluate.py checkpoint=PATH sampler.S=50
    python scripts/evaluate.py -m checkpoint=PATH sampler.S=10,20,50,100 sampler.eta=0.0,0.5,1.0
    python scripts/evaluate.py -m checkpoint=PATH sampler=ddim,ddpm,sigma_hat sampler.S=10,20
    python scripts/evaluate.py -m experiment=table1_cifar10 checkpoint=PATH
    python scripts/evaluate.py --help

Evaluations whose record is already in the output folder are not computed again; an interrupted one continues.
"""

from _cli import entry
from _sweep import Sweep

if __name__ == "__main__":
    sweep = Sweep("ddim.evaluation.fidelity", "EvaluateSpec")
    entry(sweep.run, "evaluate", finish=sweep.report, plan=sweep.plan)
