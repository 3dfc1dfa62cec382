"""Encode real images with DDIM, decode them, and measure how far off they come back (Table 2 of the paper).

    python scripts/reconstruct.py checkpoint=PATH sampler.S=50
    python scripts/reconstruct.py -m experiment=table2_reconstruction checkpoint=PATH
    python scripts/reconstruct.py --help

Evaluations whose record is already in the output folder are not computed again; an interrupted one continues.
"""

from _cli import entry
from _sweep import Sweep

if __name__ == "__main__":
    sweep = Sweep("ddim.evaluation.reconstruction", "ReconstructSpec")
    entry(sweep.run, "reconstruct", finish=sweep.report, plan=sweep.plan)
