"""Stage "relabel": soft labels of the distilled images, or the decision that the teacher labels at student time."""

from __future__ import annotations

from typing import Any

from ltdd_scale import softlabels
from ltdd_scale.config import Config
from ltdd_scale.data import arrays
from ltdd_scale.data.loader import MemoryImages, normalizer
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.models import registry
from ltdd_scale.runtime import files, tensors
from ltdd_scale.runtime.context import Context


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write ``labels.json`` (kind, seed, epochs, τ) and, by kind, ``epoch-00000-values.npy`` (fp16) with ``-classes.npy`` (int16), or ``single.npy``.

    Epochs are the unit of work; batches are of a fixed composition, so the bytes do not depend on the number of ranks.
    """
    ranks, settings = context.ranks, config.relabel
    split = ShardSplit(context.input("shard"), "train")
    facts: dict[str, Any] = {
        "labels": settings.labels,
        "seed": f"labels {config.seed}",
        "epochs": 0,
        "tau": 0.0,
    }
    if settings.labels == "hard" or (settings.labels == "online" and not settings.adjust):
        if ranks.first:
            files.write_json(context.out / "labels.json", facts)
        return facts
    pixels, classes = arrays.load_classes(context.input("recover"), len(split.classes))
    images = MemoryImages(pixels, classes, ranks.device)
    saved = tensors.load(context.input("teacher") / "weights.pt")
    teacher = ranks.to_device(registry.Network.build(saved["recipe"], saved["model"]))
    normalize = normalizer(split.mean, split.std, ranks.device)
    spec = softlabels.view_spec(config.evaluate, config.data.resolution, config.data.mirror)
    plain = softlabels.single_logits(
        images, teacher, normalize, spec, settings.batch_size, None, ranks
    )
    shift = None
    if settings.adjust:
        facts["tau"] = softlabels.adsa_tau(plain, classes, split.counts)
        shift = softlabels.shift_of(facts["tau"], split.counts, ranks.device)
    if settings.labels == "single" and ranks.first:
        arrays.save(
            context.out / "single.npy", (plain if shift is None else plain - shift).cpu().numpy()
        )
    if settings.labels == "stored":
        facts["epochs"] = settings.epochs or config.evaluate.epochs
        mine = range(ranks.rank, facts["epochs"], ranks.world)
        progress = context.progress("relabel", len(mine), "epochs")
        for k, epoch in enumerate(mine):
            path = softlabels.stored_file(context.out, epoch, "values")
            if not path.exists():
                packed = softlabels.store_epoch(
                    images,
                    teacher,
                    normalize,
                    spec,
                    facts["seed"],
                    epoch,
                    config.evaluate.cutmix,
                    settings.topk,
                    settings.batch_size,
                    shift,
                    ranks,
                )
                for part in sorted(
                    packed
                ):  # classes before values, whose presence says that the epoch is done
                    arrays.save(softlabels.stored_file(context.out, epoch, part), packed[part])
            progress.update(k + 1)
    if ranks.first:
        files.write_json(context.out / "labels.json", facts)
    return facts
