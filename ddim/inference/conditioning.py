"""Labels and guidance as commands name them, for a model that knows classes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.checkpoints.model import saw_labels_only
from ddim.config import config_context, suggest
from ddim.data.images import Images
from ddim.diffusion.guidance import ALL, OWN, Condition, GuidanceSpec
from ddim.diffusion.sampling import Model, State
from ddim.errors import UserError
from ddim.image_io import class_grid, grid

Label = int | str | None  # a number, a name, `all`, or null for none
M = TypeVar("M", bound=LoadedModel)
MOST_NAMES = 20  # of classes, in a message


def conditioned(model: M, label: Label, guidance: GuidanceSpec, images: Images | None = None) -> M:
    """Return the model with what its images are to show; the same model where it is unconditional.

    Args:
        model: any.
        label: of all images, by number or name; `all` for labels in turn, image i having label i mod K; `own` for those
            of `images`; None for none.
        guidance: how strongly.
        images: whose labels are known, for `own`.

    Raises:
        UserError: the model knows no classes, or not this one; guidance without a label, or of a network that has only
            seen images with labels; an interval beyond T; or `own` without images that have labels.
    """
    if (K := model.spec.num_classes) is None:
        if label is not None or guidance != GuidanceSpec():
            asked = f"label={label}" if label is not None else f"guidance.w={guidance.w:g}"
            raise UserError(
                f"{asked} needs a checkpoint that was trained with classes, and this one knows none; leave label and "
                "guidance out, or train one with data.labels=..."
            )
        return model
    if saw_labels_only(model) and (label is None or guidance.w != 0):
        raise UserError(
            "the checkpoint has seen no image without its label (objective.label_drop=0), which label=null and "
            "guidance ask for; give a label with guidance.w=0, or train one with objective.label_drop=0.1."
        )
    T = model.spec.schedule.T
    if guidance.interval is not None and guidance.interval[1] > T:
        raise UserError(f"guidance.interval={list(guidance.interval)} must end at T={T} or before.")
    classes = model.spec.classes or tuple(map(str, range(K)))
    own = labels_of(images, classes) if label == OWN and images is not None else ()
    with config_context("guidance"):
        condition = Condition(classes, _find(label, classes, images), guidance, own)
    return dataclasses.replace(model, condition=condition)


def unlabelled(model: LoadedModel, what: str) -> None:
    """Refuse a model that cannot be evaluated without labels.

    Raises:
        UserError: it has seen no image without its label.
    """
    if saw_labels_only(model):
        raise UserError(
            f"{what} is computed without labels, and the checkpoint has seen no image without its label "
            "(objective.label_drop=0); train one with objective.label_drop=0.1."
        )


def guided_states(
    model: LoadedModel,
    indices: Sequence[int] | Tensor,
    device: torch.device,
    walk: Callable[[Model], Iterator[State]],
) -> Iterator[State]:
    """Return the states of a trajectory of images by number, with labels and guidance where the model has them."""
    if model.condition is None:
        return walk(model)
    network = model.condition.bind(model, indices, device)
    return network.counted(walk(network))


def condition_settings(model: LoadedModel) -> dict[str, Any]:
    """Return what a record or a file states about label and guidance; {} of an unconditional model."""
    return {} if model.condition is None else {"condition": model.condition.settings()}


def condition_suffix(model: LoadedModel) -> str:
    """Return what tables add to the name of a sampler; "" of an unconditional model."""
    return "" if model.condition is None else model.condition.suffix


def arrange(model: LoadedModel, images_u8: Tensor, indices: Sequence[int]) -> Tensor:
    """Return images by number as a grid, uint8 (C, H', W'): with labels in turn, a row for each class."""
    condition = model.condition
    if condition is None or condition.label != ALL or len(images_u8) <= len(condition.classes):
        return grid(images_u8)
    return class_grid(images_u8, condition.labels(indices))


def one_label(model: LoadedModel, what: str) -> None:
    """Refuse labels that depend on the numbers of images.

    Raises:
        UserError: label=all.
    """
    if model.condition is not None and model.condition.label == ALL:
        raise UserError(f"{what} takes one label for all images, not label=all; give a name or a number.")


def _find(label: Label, classes: tuple[str, ...], images: Images | None) -> Label:
    """Return a label as `Condition` takes it."""
    if label in (None, ALL) or (label == OWN and images is not None):
        return label
    if str(label) in classes:
        return classes.index(str(label))
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    names = ", ".join(classes[:MOST_NAMES]) + (", ..." if len(classes) > MOST_NAMES else "")
    raise UserError(
        f"label={label} is no class of the checkpoint{suggest(str(label), classes)}; allowed: all, a number from 0 to "
        f"{len(classes) - 1}, or a name: {names}."
    )


def labels_of(images: Images, classes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the labels of a data set, by image.

    Raises:
        UserError: it has none, or other classes than these.
    """
    if images.labels is None:
        raise UserError(f"{images.name} has no labels, which this needs; give data.labels=...")
    if images.classes != classes:
        theirs, ours = (", ".join(names[:MOST_NAMES]) for names in (images.classes, classes))
        raise UserError(f"{images.name} has the classes {theirs}, and the checkpoint knows {ours}; take its own data.")
    return tuple(images.labels.tolist())
