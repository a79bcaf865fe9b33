"""Settings of the real, long-tailed set."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, SerializerFunctionWrapHandler, model_serializer

from ltdd_scale.data.catalog import SOURCES
from ltdd_scale.settings import Number, Settings, Switch, Text, Whole, option


def _known(value: str) -> str:
    if value not in SOURCES:
        raise ValueError(f"{value!r} is none of {', '.join(SOURCES)}")
    return value


class Location(Settings):
    """Where the images lie. Not hashed: a set that has moved is the same set.

    Another tree under the same lists counts as the same set too.
    """

    path: Text = option(
        "",
        "folder: train/<class>/… and test/<class>/…, or <class>/… with data.test_fraction, "
        "torchvision's CIFAR folder or Tiny-ImageNet's; list: the root that list lines start from; "
        "shards: a shard set",
    )
    train_list: Text = option(
        "",
        "list: file of 'path label' lines, plain or .gz; relative names are looked up under "
        "data.path",
    )
    val_list: Text = option("", "list: the same for validation; empty: none")
    test_list: Text = option("", "list: the same for testing")
    val_folder: Text = option(
        "",
        "folder: name of the folder of validation images, val say, beside train/ and test/, with "
        "the same folders of classes; empty: none",
    )


class Expected(Settings):
    """What the source holds, for estimates where it is not here. Not hashed: nothing is made of it.

    With `profile: counts` the counts stand in the config anyway.
    """

    expected_classes: Whole = option(
        0, "classes of the source, for a dry run where the images are not; 0: not said", low=0
    )
    expected_per_class: Whole = option(
        0, "training images of each of these classes in the source; 0: data.max_per_class", low=0
    )
    expected_counts: list[Whole] = option(
        [], "the same for each class, in label order, where classes differ in the source"
    )
    expected_test: Whole = option(0, "test images of the source, for the same estimates", low=0)


class Chosen(Settings):
    """Which images of the source make the set, and how they are stored in the shards."""

    source: Annotated[Text, AfterValidator(_known)] = option(
        "digits", f"where the images come from: {', '.join(SOURCES)}"
    )
    profile: Literal["exponential", "counts", "full"] = option(
        "exponential",
        "exponential: n_c = int(n_max · IF^(−c/(C−1))); counts: as given; full: all there is",
    )
    imbalance_factor: Number = option(1.0, "exponential: largest over smallest class", low=1)
    max_per_class: Whole = option(0, "exponential: n_max; 0: the size of the largest class", low=0)
    counts: list[Whole] = option([], "counts: images of each class, in label order")
    test_per_class: Whole = option(
        0, "images a class held out for testing where the source has no test split (digits)", low=0
    )
    min_per_class: Whole = option(
        0, "folder: classes with fewer training images are left out; 0 or 1: none is", low=0
    )
    test_fraction: Number = option(
        0.0,
        "share of the images of each class held out for testing, for a folder without test images: "
        "round(n · share), at least one, never all",
        low=0,
        high=0.9,
    )
    val_per_class: Whole = option(
        0,
        "training images a class held out for validation before the long tail is drawn; counts: of "
        "what they leave unused, at most so many",
        low=0,
    )
    val_fraction: Number = option(
        0.0,
        "share of the training images of each class held out for validation after the long tail is "
        "drawn, for sets that leave none unused: round(n · share), at least one, never all",
        low=0,
        high=0.9,
    )
    split_seed: Whole = option(
        42, "seed of the choice of images; the same seed gives nested sets for growing imbalance"
    )
    store_resolution: Whole = option(
        0,
        "side in pixels of the images in the shards (short side, centre crop, PNG); 0: "
        "original bytes",
        low=0,
    )
    store_quality: Whole = option(
        0, "JPEG quality of images stored at store_resolution; 0: lossless PNG", low=0, high=100
    )
    shard_images: Whole = option(2000, "images a shard (2,000 of ImageNet are about 220 MB)", low=1)

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Settings that came later are written, and so hashed, only where they are on: sets without
        them stay what they are."""
        later = ("test_fraction", "val_fraction", "min_per_class")
        return {k: v for k, v in write(self).items() if k not in later or v}


class Seen(Settings):
    """How networks are shown the images."""

    resolution: Whole = option(32, "side in pixels that networks see", low=4)
    mirror: Switch = option(True, "a mirrored image is still of its class (not so for digits)")
    memory_gb: Number = option(
        4.0,
        "sets that fit in this when decoded are held in memory, as centre squares; larger "
        "ones are cropped from the originals",
        low=0,
    )
    loader: Literal["auto", "dali", "dali-cpu", "torch"] = option(
        "auto",
        "what decodes sets too large for memory; auto: DALI where it is installed, else PyTorch; "
        "dali: on the GPU where there is one; dali-cpu: on CPU cores, for a GPU that is busy",
    )

    def decoded(self, images: int) -> int:
        """Bytes of so many images, uint8 [n, 3, R, R]."""
        return images * 3 * self.resolution**2

    def fits(self, images: int) -> bool:
        """Whether so many images are held in memory."""
        return self.decoded(images) <= self.memory_gb * 2**30


class Whitened(Settings):
    """ZCA whitening. Hashed only where it is on: sets without it stay what they are."""

    zca: Switch = option(
        False,
        "networks see images that are ZCA-whitened, fitted on the training images, instead of "
        "normalised by channel; for matching methods and labels that no teacher makes; needs at "
        "least 3·resolution² training images",
    )
    zca_eps: Number = option(
        0.1, "zca: ε, added to the eigenvalues of the covariance of pixels in [0, 1]", low=1e-6
    )


class Data(Whitened, Seen, Chosen, Expected, Location):
    """The real, long-tailed set."""

    @property
    def validated(self) -> bool:
        """Whether the source is said to have a validation split of its own."""
        said = {"list": self.val_list, "folder": self.val_folder}
        return bool(said.get(self.source))

    @classmethod
    def of(cls, chosen: Chosen, location: Location) -> Data:
        """Both halves of what a source is told."""
        return cls(**chosen.model_dump(), **location.model_dump())
