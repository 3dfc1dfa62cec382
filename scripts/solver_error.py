"""Measure how far a solver's samples are from the exact trajectory's, from the same x_T; needs no real images.

    python scripts/solver_error.py checkpoint=PATH sampler=unipc sampler.S=10
    python scripts/solver_error.py -m checkpoint=PATH sampler=ddim,heun,unipc sampler.S=null sampler.nfe=5,9,15,25
    python scripts/solver_error.py -m experiment=table_solver_error_digits
    python scripts/solver_error.py --help

Evaluations whose record is already in the output folder are not computed again; an interrupted one continues.
"""

from _cli import entry
from _sweep import Sweep

if __name__ == "__main__":
    sweep = Sweep("ddim.evaluation.trajectory_error", "TrajectoryErrorSpec")
    entry(sweep.run, "solver_error", finish=sweep.report, plan=sweep.plan)
