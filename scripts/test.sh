#!/usr/bin/env bash
# Lint, type check and test; about sixteen minutes on two cores. Other arguments go to pytest: bash scripts/test.sh -k sampling
#   bash scripts/test.sh --quick     lint and unit tests, in 90 s
set -euo pipefail
source "$(dirname "$0")/_environment.sh"

QUICK=
[ "${1:-}" = --quick ] && { QUICK=1; shift; }

stage "lint"
$PYTHON -m ruff check .
$PYTHON -m ruff format --check .
[ -n "$QUICK" ] || $PYTHON -m mypy

stage "pytest"
# One process with one thread for each core, at most 8. The processes that tests start need not compile the code again.
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE
PROCESSES=$($PYTHON -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
if [ -n "$QUICK" ]; then set -- -m "not integration and not slow and not network" "$@"; fi
$PYTHON -m pytest -n "$PROCESSES" --dist worksteal "$@"
