"""Settings of the exported set. No stage reads them: they change no result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from ltdd_scale.settings import Settings, Switch, Text, Whole, option

Images = Literal["png", "webp", "webp-lossy", "jpeg"]
FORMATS = ("parquet", "webdataset")  # beside the folder of images, which every set has
SET, IMAGEFOLDER, DDRANKING = "set", "imagefolder", "ddranking"
EXPORTS = (SET, IMAGEFOLDER, *FORMATS, DDRANKING)  # what `ltdd-scale export` writes
Words = Annotated[Text, AfterValidator(str.strip)]  # spaces alone say nothing
NAMED_SETS = ("CIFAR10", "CIFAR100", "TinyImageNet", "ImageNet1K")  # that ddranking knows


class Publish(Settings):
    """The distilled set as it is given away."""

    license: Words = option(
        "",
        "licence of the source images, such as cc-by-4.0 (Hugging Face's name of it, or any other "
        "words); empty: the card says that it is not stated",
    )
    license_link: Words = option("", "where a licence of another name can be read: a URL")
    source: Words = option("", "what the images were distilled from, for the card: a name or a URL")
    tags: list[Text] = option([], "more tags for the card's header")
    formats: list[Literal["parquet", "webdataset"]] = option(
        list(FORMATS), "what is written beside images/: each holds all images and labels once more"
    )
    images: Images = option(
        "png", "format of the images: png and webp lose nothing, webp-lossy and jpeg do"
    )
    pictures: Switch = option(
        True, "pictures in the page and as SVG and PNG files; without: some seconds less a run"
    )
    quality: Whole = option(90, "quality of webp-lossy and jpeg, of 100", low=1, high=100)
