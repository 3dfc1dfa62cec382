#!/usr/bin/env bash
# Lint, type check and test. Arguments go to pytest: bash scripts/test.sh -k sampling
set -euo pipefail
source "$(dirname "$0")/_environment.sh"

stage "ruff and mypy"
$PYTHON -m ruff check .
$PYTHON -m ruff format --check .
$PYTHON -m mypy

stage "pytest"
$PYTHON -m pytest "$@"
