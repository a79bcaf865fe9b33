"""Settings of DAMED (LAD)."""

from __future__ import annotations

from ltdd_scale.methods.matching.settings import Unrolled
from ltdd_scale.settings import Number, Switch, Whole, option


class Damed(Unrolled):
    """Trajectory matching for long tails: DAMED, whose first version was called LAD."""

    inner_steps: Whole = option(40, "N, steps of the student in a segment", low=1)
    matching: Switch = option(
        True,
        "distribution-agnostic matching: the student's loss is weighted by class frequency, so "
        "that the student becomes as biased as the expert and the images need not",
    )
    decoupling: Switch = option(
        True,
        "expert decoupling: the backbone is matched to experts, the classifier to one that was "
        "trained once more on balanced batches (section classifiers)",
    )
    learn_labels: Switch = option(
        True, "soft labels, from the experts' logits to begin with, are learned with the images"
    )
    lr_labels: Number = option(2.0, "learning rate of the label logits (momentum .9)", low=0)
    backbone_weight: Number = option(1.0, "λ1, weight of the backbone's segment", low=0)
    classifier_weight: Number = option(0.5, "λ2, weight of the classifier's segment", low=0)
    classifier_steps: Whole = option(
        20, "N₂, steps of the student's classifier in its segment", low=1
    )
    classifier_target: Whole = option(
        2, "M₂, snapshots of the balanced classifier from its start to the target", low=1
    )
    current_start: Whole = option(
        0,
        "last snapshot that a segment starts from in the first iteration; it grows to max_start; "
        "0: max_start at once",
        low=0,
    )
    expansion: Whole = option(1000, "iterations in which current_start grows to max_start", low=1)
