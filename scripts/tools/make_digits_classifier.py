"""Make the weights of the "digits-classifier" extractor (ddim/evaluation/assets/digits_classifier.npz).

    python scripts/tools/make_digits_classifier.py [--out FILE]

Trains on 1,437 of scikit-learn's 1,797 digits to print the accuracy on the other 360, then on all of them for the file.
Takes seconds on a CPU. The file in the repository is the reference: another machine makes a file whose features, and so
distances, differ slightly.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddim.evaluation.extractor_networks import DIGITS_WEIGHTS, DigitsNet

HELD_OUT = 360


def load_digits() -> tuple[Tensor, Tensor]:
    """Return all digits in their stored order: images (1797, 1, 8, 8) in [0, 1], rounded to 8 bits, and labels."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    rounded = np.round(images * (255 / 16)).astype(np.float32) / 255
    return torch.from_numpy(rounded).view(-1, 1, 8, 8), torch.from_numpy(labels)


def train(images: Tensor, labels: Tensor, epochs: int = 30, batch_size: int = 64, seed: int = 0) -> DigitsNet:
    """Train a `DigitsNet` from `seed` with Adam, a one-cycle rate and shifts of up to one pixel.

    The caller's random state is left as it was.
    """
    steps = epochs * -(-len(images) // batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsNet()
        optimizer = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                dy, dx = torch.randint(3, (2,)).tolist()
                shifted = F.pad(images[batch], (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]
                optimizer.zero_grad()
                F.cross_entropy(net(shifted), labels[batch], label_smoothing=0.05).backward()
                optimizer.step()
                schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of the images that `net` classifies correctly."""
    return (net(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train twice, write the file, print accuracies, size and checksum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DIGITS_WEIGHTS, help="the file to write (default: %(default)s)")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # the net is small; and the sums then do not depend on the number of cores
    images, labels = load_digits()
    held_out = accuracy(train(images[:-HELD_OUT], labels[:-HELD_OUT]), images[-HELD_OUT:], labels[-HELD_OUT:])
    print(f"accuracy on the {HELD_OUT} held out: {held_out:.4f}")
    net = train(images, labels)
    print(f"accuracy on all {len(images)} after training on all: {accuracy(net, images, labels):.4f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **{key: value.numpy() for key, value in net.state_dict().items()})
    content = out.read_bytes()
    print(f"{out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
