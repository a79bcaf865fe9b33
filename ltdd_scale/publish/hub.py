"""The header of a card as Hugging Face reads it: licence, tags, size, where the data are."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ltdd_scale.publish.opened import Opened

# Identifiers that Hugging Face knows, of those that sets of images have. Any other licence is
# "other" there, with its name beside it.
LICENSES = """
    apache-2.0 mit openrail afl-3.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-3.0 agpl-3.0 odbl odc-by pddl ms-pl mpl-2.0 unlicense
    unknown other
"""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))
PATHS = {
    "parquet": "parquet/*.parquet",
    "webdataset": "webdataset/*.tar",
    "imagefolder": "images/**",
}
ASKS = (
    "the licence of the source images is not stated: set publish.license (such as cc-by-4.0), or "
    "'ltdd-scale export SET --license', before you give the set away"
)


# Of the images, by what they are: who looks for distilled ones finds no others.
TAGS = {"distilled": "dataset-distillation", "initial": "coreset", "random": "random-subset"}


def header(opened: Opened, formats: list[str], num_images: int) -> str:
    """The YAML between the ``---`` lines."""
    publish, made = opened.publish, TAGS[opened.kept]
    method = [opened.told["config"]["method"]] * (opened.kept != "random")  # it made none of those
    default = next(name for name in PATHS if name in formats)
    told: dict[str, Any] = {
        "pretty_name": opened.told["name"],
        **_license(publish.license, publish.license_link),
        "task_categories": ["image-classification"],
        "tags": list(dict.fromkeys([made, "long-tailed", "image", *method, *publish.tags])),
        "size_categories": [size_category(num_images)],
        # One only: `datasets` reads all of a card's by one and the same reader.
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": PATHS[default]}],
            }
        ],
    }
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True).strip()


def _license(name: str, link: str) -> dict[str, str]:
    """The fields that say it; none where nobody has said it."""
    if not name:
        return {}
    if name.lower() in LICENSES.split():
        told = {"license": name.lower()}
    else:
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        told = {"license": "other", "license_name": slug or "other"}
    return told | ({"license_link": link} if link else {})


def size_category(num_images: int) -> str:
    """Hugging Face's name of a number of images."""
    return next((name for limit, name in SIZES if num_images < limit), "1M<n<10M")
