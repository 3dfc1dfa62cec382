#!/usr/bin/env bash
# From a fresh clone to a table: install, train on 1,797 real images of handwritten digits, sweep S and the sampler.
# Takes under six minutes on two CPU cores after the installation. It can be run again: finished steps are skipped.
set -euo pipefail
source "$(dirname "$0")/_environment.sh"

stage "training a U-Net of 0.28 million parameters on handwritten digits (about three minutes)"
$PYTHON scripts/train.py experiment=digits checkpoint=last

stage "sampling and measuring 4 samplers x 4 numbers of steps (about a minute)"
$PYTHON scripts/evaluate.py -m experiment=table_digits

stage "sampling a grid of digits"
$PYTHON scripts/sample.py checkpoint=outputs/train/digits/checkpoints/last.ckpt output_dir=outputs/samples/digits \
    n=100 sampler.S=50 sampler.eta=1.0 overwrite=true
echo "--- done in $((SECONDS - STARTED)) s; $SECONDS s in all. The table is outputs/evaluate/digits/table.md."
