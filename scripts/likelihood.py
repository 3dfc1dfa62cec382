"""Measure the likelihood of images under a model, in bits per dimension: by the probability-flow equation, or a bound.

    python scripts/likelihood.py checkpoint=PATH data=cifar10
    python scripts/likelihood.py checkpoint=PATH data=cifar10 method=bound
    python scripts/likelihood.py -m experiment=table_likelihood_digits
    python scripts/likelihood.py --help

Evaluations whose record is already in the output folder are not computed again; an interrupted one continues.
"""

from _cli import entry
from _sweep import Sweep

if __name__ == "__main__":
    sweep = Sweep("ddim.evaluation.likelihood", "LikelihoodSpec")
    entry(sweep.run, "likelihood", finish=sweep.report, plan=sweep.plan)
