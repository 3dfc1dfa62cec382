"""Made-up records with the fields that an evaluation writes."""

from typing import Any

from ddim.results.records import Record

FID = "fid_50k"


def record(label: str, S: int, value: float, spacing: str = "quad", **changes: Any) -> Record:
    """Return a record; the change a__b=value sets record["a"]["b"]."""
    made: Record = {
        "model": {
            "weights": "ema",
            "weights_hash": "0123456789abcdef",
            "step": 800_000,
            "schedule": "linear",
            "T": 1000,
            "prediction": "eps",
            "description_hash": "d",
        },
        "sampler": {
            "rule": "ddim",
            "eta": 0.0,
            "clip": "none",
            "last_time": 0,
            "tau": [1 + i * 1000 // S for i in range(S)],
        },
        "n": 50_000,
        "seed": 0,
        "bf16": False,
        "pixels": "uint8, rounded half up",
        "reference": {"name": "cifar10-train", "images": 50_000, "fingerprint": "fedcba9876543210"},
        "metric": {
            "extractor": "inception",
            "feature_layer": "2048",
            "resize": "TF1-style bilinear",
            "weights_hash": "aaaabbbbccccdddd",
            "reference_split": "train",
        },
        "metrics": {FID: value},
        "trained_on": "cifar10",
        "label": label,
        "S": S,
        "spacing": spacing,
        "distinct_evaluations": S,
        "seconds_sampling": 1.5 * S,
        "seconds_metrics": 2.0,
        "config": {"name": "made", "output_dir": "/somewhere", "checkpoint": "/somewhere/else"},
        "revision": "65555dbe4f565bf0b97737c8a5ca57ab3ba9f7be",
        "versions": {"ddim": "0.1.0", "torch": "2.15.0"},
    }
    if label.startswith("σ̂"):
        made["sampler"] |= {"rule": "sigma_hat", "eta": None}
    if "(clip " in label:
        made["sampler"]["clip"] = label.partition("(clip ")[2].rstrip(")")
    for path, changed in changes.items():
        outer, _, inner = path.partition("__")
        made[outer] = {**made[outer], inner: changed} if inner else changed
    return {"key": f"{label}{S}{spacing}{made.get('first', 0)}", **made}


def compared(*numbers: tuple[str, int, float]) -> list[Record]:
    """Return records (label, S, value) that are compared with the paper's Table 1."""
    return [record(label, S, value, paper="table1_cifar10") for label, S, value in numbers]


# Not in order, and incomplete, like those of an interrupted sweep.
RECORDS = [
    record("σ̂", 10, 367.43),
    record("η=1.0", 10, 41.07),
    record("η=0.0", 100, 4.16),
    record("η=0.0", 10, 13.36),
    record("η=0.2", 20, 7.11),
    record("η=0.0 (clip x0)", 20, 0.0123),
    record("σ̂", 1000, 3.17, "full"),
]
