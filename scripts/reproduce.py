"""Run the evaluation of a record again: its numbers come out, or it says which digit differs and what has changed.

    python scripts/reproduce.py KEY               # the key is in table.csv and records.jsonl
    python scripts/reproduce.py KEY FOLDER        # also searched for the record and the weights
    python scripts/reproduce.py --help

The exit status is 0 if all metrics agree to `digits` significant digits, 1 if not, and 2 if it cannot be run.
"""

import re
import sys
from typing import Any

from _cli import entry
from _last_words import quoted
from _sweep import current_session

failed: list[str] = []  # metrics that differ


def main(config: dict[str, Any]) -> None:
    """Reproduce a record as `config` says; print the numbers and what has changed."""
    from ddim.config import build
    from ddim.evaluation.reproduce import MOST_DIGITS, ReproduceSpec, reproduce

    spec = build(ReproduceSpec, config, "")
    session = current_session()
    done = reproduce(spec, session)
    agreement = done.agreement()
    failed.extend(name for name, digits in agreement.items() if digits < spec.digits)
    if not session.processes.is_main:
        return
    print(f"record: {spec.key} in {done.records}")
    if done.checkpoint is not None:
        print(f"weights: {done.checkpoint}")
    for name, digits in agreement.items():
        before, now = done.recorded["metrics"][name], done.now["metrics"].get(name)
        verdict = "equal" if digits == MOST_DIGITS else f"{digits} significant digits agree, digit {digits + 1} differs"
        print(f"{name}: {before!r}, now {now!r}: {verdict}")
    for line in done.changes() or ["nothing that is recorded"]:
        print(f"changed: {line}")
    print(f"different: {', '.join(failed)}" if failed else f"equal to {spec.digits} significant digits or more")


def finish() -> None:
    """End with status 1 if a number differs."""
    if failed:
        sys.exit(1)


def as_overrides(words: list[str]) -> list[str]:
    """Return the words of the command with KEY and FOLDERs as key=... and folders=[...], quoted for Hydra."""
    plain = [word for word in words if "=" not in word and not word.startswith("-")]
    rest = [re.sub(r"^key=(\w+)$", r"key='\1'", word) for word in words if word not in plain]
    if not plain:
        return rest
    key, *folders = plain
    return [f"key='{key}'", *([f"folders=[{','.join(map(quoted, folders))}]"] if folders else []), *rest]


if __name__ == "__main__":
    sys.argv[1:] = as_overrides(sys.argv[1:])
    entry(main, "reproduce", finish=finish)
