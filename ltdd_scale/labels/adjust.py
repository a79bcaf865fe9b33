"""ADSA: a teacher of a long tail is adjusted by τ·log π before it labels, τ found on the images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data.augment import Views
from ltdd_scale.labels.contract import Maker


def whole_logits(maker: Maker) -> Tensor:
    """The teacher's logits on each whole, unaugmented image, float32 [n, C], not adjusted, the same
    on every rank."""
    return logits_of(maker, None)


def logits_of(maker: Maker, views: Views | None) -> Tensor:
    """The teacher's logits on one view of each image, float32 [n, C], not adjusted. `views`: of all
    images, as `ViewSpec.draw` draws them; None: the whole images.

    Ranks share out the batches, whose composition does not depend on how many ranks there are.
    """
    size, order, ranks = maker.relabel.batch_size, np.arange(len(maker.images.labels)), maker.ranks
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    mine = batches[ranks.rank :: ranks.world_size]
    plans = [(batch, None if views is None else views[batch]) for batch in mine]
    shown = zip(mine, maker.images.stream(plans, maker.spec), strict=True)
    out = torch.zeros(len(order), maker.num_classes, device=ranks.device)
    for number, (batch, x) in enumerate(shown, 1):
        out[batch[0] : batch[-1] + 1] = maker.teach(maker.normalize(x))
        maker.tell(number, len(mine))
    ranks.barrier()  # on the CPUs, where a slow rank may be waited for long
    return ranks.all_reduce(out)


def adsa_tau(
    logits: Tensor, classes: np.ndarray, prior: np.ndarray, high: float = 2.0, steps: int = 81
) -> float:
    """τ of ADSA: with p ∝ exp(f_y − τ·log π_y), the one with the smallest spread over classes of
    the mean confidence in the own class.

    `logits` float [n, C] on the distilled images of `classes` int64 [n], `prior` [C] the class
    frequencies of the long-tailed set.
    """
    log_prior = torch.from_numpy(np.log(prior / prior.sum())).to(logits.device)
    own = torch.from_numpy(classes).to(logits.device)
    sizes = torch.from_numpy(np.bincount(classes, minlength=logits.shape[1]))
    best = (float("inf"), 0.0)
    for tau in np.linspace(0, high, steps):
        p = F.softmax(logits.double() - tau * log_prior, 1).gather(1, own[:, None])[:, 0]
        # Summed by NumPy, in order: a GPU's bincount is in none.
        sums = np.bincount(classes, p.cpu().numpy(), logits.shape[1])
        spread = float((torch.from_numpy(sums) / sizes).std())
        best = min(best, (spread, float(tau)))
    return best[1]


def tau_of(maker: Maker, logits: Tensor | None = None) -> float:
    """τ for the maker's images; 0 where labels are not adjusted. `logits`: `whole_logits`, where
    they are known already."""
    if not maker.relabel.adjust:
        return 0.0
    found = whole_logits(maker) if logits is None else logits
    return adsa_tau(found, maker.images.labels, maker.train_counts)


def shift_of(tau: float, counts: np.ndarray, device: torch.device) -> Tensor | None:
    """τ·log π less its mean, float32 [C], to be subtracted from the logits; None where τ is 0.

    A softmax does not see the mean, students of raw logits would have to learn it.
    """
    if not tau:
        return None
    shift = tau * np.log(counts / counts.sum())
    return torch.from_numpy(shift - shift.mean()).float().to(device)


def shifted(logits: Tensor, shift: Tensor | None) -> Tensor:
    """Adjusted logits [n, C]."""
    return logits if shift is None else logits - shift
