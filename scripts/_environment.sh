# Sourced by quickstart.sh and test.sh: sets PYTHON to an interpreter that has the project installed.
#
# An active virtual or conda environment that this checkout is installed in is used as it is. Otherwise .venv is created next to the README;
# it is installed again when pyproject.toml or constraints.txt has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAGE="start"
STARTED=$SECONDS
trap 'code=$?; [ $code -eq 0 ] || echo "error: failed while: $STAGE (exit status $code). The lines above give the reason; fix it and run the command again." >&2' EXIT

stage() { # print what begins, and how long the last stage took
    [ "$STAGE" = start ] || echo "--- done in $((SECONDS - STARTED)) s"
    STAGE=$1
    STARTED=$SECONDS
    echo "--- $STAGE"
}

# -I: only an installed package counts, not the folder ddim/ in this directory.
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python -I - 2>/dev/null <<'CHECK'
import pathlib, sys
import ddim, hydra, lightning, pytest
sys.exit(pathlib.Path(ddim.__file__).resolve().parents[1] != pathlib.Path.cwd().resolve())
CHECK
then
    PYTHON=python
    echo "--- using the active environment ${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
else
    PYTHON=.venv/bin/python
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then
        echo "--- using .venv, already installed"
    else
        stage "creating .venv and installing the project (some minutes and several GB, most of it torch)"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: Python 3.11 or newer is needed; $(python3 --version 2>&1) was found." >&2; exit 1; }
        python3 -m venv .venv ||
            { echo "error: python3 -m venv failed; on Debian and Ubuntu, apt install python3-venv." >&2; exit 1; }
        $PYTHON -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,efficientnet,lsun,diffusers,launchers]'
        echo "$wanted" > .venv/installed
    fi
fi
