"""The labels behind metrics of classes: those that images were sampled with, and those of the reference set."""

from typing import Any

import torch

from ddim.checkpoints import LoadedModel, weights_hash
from ddim.data.images import Images
from ddim.diffusion.guidance import ALL
from ddim.errors import UserError
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.metrics import MetricSpec
from ddim.inference.conditioning import labels_of
from ddim.io import printable

MOST_DIFFERENCE = 0.1  # of a class's share, relative to an equal one, that nobody is warned of


def share_warning(model: LoadedModel, reference: Images) -> str | None:
    """Return a warning where labels in turn make classes of other shares than the reference set has, else None."""
    condition = model.condition
    if condition is None or condition.label != ALL or reference.labels is None:
        return None
    K = len(condition.classes)
    shares = torch.bincount(reference.labels, minlength=K) / len(reference.labels)
    number = int((shares - 1 / K).abs().argmax())
    if abs(K * (share := float(shares[number])) - 1) <= MOST_DIFFERENCE:
        return None
    name = reference.classes[number] if number < len(reference.classes) else str(number)
    return (
        f"label=all makes as many images of each class, {1 / K:.1%}, and {reference.name} has {share:.1%} of "
        f"{printable(name)}: distances hold this difference too, whatever the images are like."
    )


def check_class_metrics(
    metric: MetricSpec, model: LoadedModel, indices: range, extractor: FeatureExtractor, reference: Images | None
) -> dict[str, Any]:
    """Check that the metrics of classes can be computed; return what a record states about the reference set for them.

    Args:
        metric: what is measured.
        model: with what its images are to show.
        indices: numbers of the images.
        extractor: of the features.
        reference: the data set; None where published statistics take its place.

    Raises:
        UserError: the images have no labels, the extractor has no logit for each class, or the reference set has no
            labels, or fewer than two images of a class.
    """
    if not metric.class_metrics:
        return {}
    condition = model.condition
    if condition is None or condition.label is None:
        raise UserError(
            f"metric.metrics={metric.class_metrics[0]} needs images of classes; give label=all, with a checkpoint that "
            "was trained with classes."
        )
    if "accuracy" in metric.metrics:
        image = torch.zeros(1, *model.spec.image_shape, dtype=torch.uint8)
        logits = extractor.extract(image)[extractor.layers[-1]].shape[1]
        if logits != len(condition.classes):
            raise UserError(
                f"the accuracy needs a logit for each class: {metric.extractor} has {logits}, and the checkpoint "
                f"knows {len(condition.classes)} classes; take another metric.extractor, or leave out 'accuracy'."
            )
    if "intra_fd" not in metric.metrics or reference is None:
        return {}
    labels = torch.tensor(labels_of(reference, condition.classes))
    for label, count in zip(*condition.labels(indices).unique(return_counts=True), strict=True):
        real = int((labels == label).sum())
        if min(int(count), real) < 2:
            raise UserError(
                f"intra_fd needs at least 2 images of each class on each side, not {int(count)} generated and {real} "
                f"reference images of {condition.classes[int(label)]}; generate more, or leave out 'intra_fd'."
            )
    return {"labels": weights_hash({"labels": labels})}
