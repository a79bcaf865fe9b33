"""Weights from elsewhere, as those of a network of the registry.

Others name and nest the tensors of one network in many ways: ``module.``, ``encoder.``, ``model``,
``state_dict_best``, ``feat_model`` beside ``classifier``. What they share is the order in which a
network is built. So tensors are found by their names under any prefix, or, where none fits, by
their shapes in order.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ltdd_scale.errors import UserError
from ltdd_scale.experts.settings import TORCHVISION
from ltdd_scale.models import registry, safe

COUNTER = "num_batches_tracked"  # of BatchNorm: nothing here reads it
FIRST = "fc_cb"  # of two heads the rebalanced one (GLMC)

Group = dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """A last linear layer: `weight` [n, d], `bias` [n], float32."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Fitted:
    """What a backbone of the registry takes, by its own names, and the file's last layer, if it
    has one for these features. `how` says how tensors were found."""

    backbone: Group
    head: Head | None
    how: str


@cache
def digest(place: str) -> str:
    """What stands for weights in a fingerprint: the file's SHA-256, or torchvision's name.

    Raises `OSError` where the file cannot be read.
    """
    if place.startswith(TORCHVISION):
        return place
    with open(place, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read(place: str, net: str) -> dict[str, Group]:
    """Every state dict at `place`, on the CPU: where it is inside the file → its tensors.

    torchvision's weights of `net` are downloaded where they are not in torch's own cache. Raises
    `UserError` where there are none, or they cannot be read.
    """
    if place.startswith(TORCHVISION):
        return {"": _downloaded(place.removeprefix(TORCHVISION), net)}
    if place.endswith(safe.SUFFIX):
        try:
            return {"": safetensors.torch.load_file(place)}
        except safetensors.SafetensorError as error:
            raise UserError(f"{place} is no safetensors file, or damaged: {error}") from None
    try:
        value = torch.load(place, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{place} holds more than tensors, and to read that would run code from the file. If "
            "you trust it, save its state dict alone: torch.save(torch.load(FILE, "
            "weights_only=False)['state_dict'], NEW)"
        ) from None
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{place} is no file of torch.save, or damaged: {error}") from None
    found = dict(_groups(value, ""))
    if not found:
        raise UserError(f"{place} holds no tensors: expected a state dict")
    return found


def _groups(value: Any, place: str) -> Iterator[tuple[str, Group]]:
    """All mappings in `value` that hold tensors themselves, outer ones first."""
    if not isinstance(value, Mapping):
        return
    own = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
    if own:
        yield place, own
    for name, inner in value.items():
        yield from _groups(inner, f"{place}.{name}" if place else str(name))


def _downloaded(name: str, net: str) -> Group:
    entry = published(name, net)
    try:
        return entry.get_state_dict(progress=False)
    except OSError as error:  # urllib's errors are such
        raise UserError(
            f"cannot download {entry.url} ({error}): download it elsewhere, and give the file's "
            "name"
        ) from None


def published(name: str, net: str) -> Any:
    """torchvision's entry of the weights `name` of `net`. Raises `UserError` where there is
    none."""
    import torchvision  # a second of every process's start: only where it is needed

    models = torchvision.models
    known = []
    if net not in registry.NAMES and net in models.list_models(models):
        known = list(models.get_model_weights(net))
    for entry in known:
        if entry.name == name:
            return entry
    names = ", ".join(entry.name for entry in known)
    raise UserError(
        f"torchvision has no weights {name!r} of {net}: " + (f"it has {names}" if names else "none")
    )


def fit(groups: Mapping[str, Group], made_of: tuple[str, int, str, int]) -> Fitted:
    """The weights of the backbone `made_of` (net, width, norm, resolution) among `groups`.

    Raises `UserError` where no state dict has all of them, with the one that is nearest.
    """
    with registry.on_meta(made_of[0]):
        model = registry.backbone(*made_of)
    wanted = {n: t.shape for n, t in model.state_dict().items() if not n.endswith(COUNTER)}
    features = registry.width_of(model)
    for place, group in groups.items():
        named = _by_name(group, wanted)
        if named is not None:
            where = f"{place}." if place else ""
            how = f"by name, under '{where}{named}'" if where + named else "by name"
            return _fitted(groups, place, {n: named + n for n in wanted}, features, how)
    for place, group in groups.items():
        ordered = _by_order(group, wanted)
        if ordered is not None:
            how = "by shapes in order" + (f", in '{place}'" if place else "")
            return _fitted(groups, place, ordered, features, how)
    raise UserError(_lacking(groups, wanted, made_of))


def _by_name(group: Group, wanted: Mapping[str, torch.Size]) -> str | None:
    """The prefix under which `group` has all that is wanted, of the same shapes."""
    anchor = next(iter(wanted))
    for name in group:
        if name != anchor and not name.endswith("." + anchor):
            continue
        prefix = name.removesuffix(anchor)
        if all(_shape(group, prefix + n) == shape for n, shape in wanted.items()):
            return prefix
    return None


def _by_order(group: Group, wanted: Mapping[str, torch.Size]) -> dict[str, str] | None:
    """Wanted name → name in `group`, where its tensors begin with the wanted shapes, in order."""
    names = [name for name in group if not name.endswith(COUNTER)][: len(wanted)]
    if [group[name].shape for name in names] != list(wanted.values()):
        return None
    return dict(zip(wanted, names, strict=True))


def _shape(group: Group, name: str) -> torch.Size | None:
    return group[name].shape if name in group else None


def _fitted(
    groups: Mapping[str, Group], place: str, names: Mapping[str, str], features: int, how: str
) -> Fitted:
    taken = {(place, name) for name in names.values()}
    head = _head(groups, place, taken, features)
    return Fitted({n: groups[place][own].float() for n, own in names.items()}, head, how)


def _head(
    groups: Mapping[str, Group], place: str, taken: set[tuple[str, str]], features: int
) -> Head | None:
    """The last linear layer: of the backbone's own state dict, or of another beside it, such as
    OLTR's ``classifier``."""
    around = place.rpartition(".")[0]
    for where in [place, *(w for w in groups if w != place and w.rpartition(".")[0] == around)]:
        heads = {
            name.removesuffix("weight"): tensor
            for name, tensor in groups[where].items()
            if (where, name) not in taken
            and name.rpartition(".")[2] == "weight"
            and tensor.ndim == 2
            and tensor.shape[1] == features
        }
        if heads:
            prefix = next((p for p in heads if FIRST in p), next(iter(heads)))
            weight = heads[prefix].float()
            bias = groups[where].get(prefix + "bias", torch.zeros(len(weight)))
            return Head(weight, bias.float())
    return None


def _lacking(groups: Mapping[str, Group], wanted: Mapping[str, torch.Size], made_of: tuple) -> str:
    """Why nothing fits: the first tensor that the largest state dict lacks."""
    group = max(groups.values(), key=len)
    names = [name for name in group if not name.endswith(COUNTER)]
    for (ours, shape), theirs in zip(wanted.items(), names, strict=False):
        if group[theirs].shape != shape:
            lack = f"where {ours} is {list(shape)}, it has {theirs} {list(group[theirs].shape)}"
            break
    else:
        lack = f"it has {len(names)} tensors, the network {len(wanted)}"
    net, width, norm, _ = made_of
    of = f"{net} (width {width}, norm {norm})" if net in registry.CONVNETS else net
    return f"the weights are not those of {of}: {lack}"
