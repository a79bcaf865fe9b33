from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from ltdd_scale.data.images import MemoryImages
from ltdd_scale.errors import UserError
from ltdd_scale.models import flops, frozen, registry
from ltdd_scale.models.average import Average
from ltdd_scale.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnet3", 16),
        ("convnet4", 32),
        ("resnet32", 32),
        ("resnet18_cifar", 32),
        ("resnet18_instance", 32),
        ("resnet18_instance", 9),
        ("vgg11_cifar", 32),
        ("vgg11_cifar", 64),
        ("alexnet_cifar", 8),
        ("alexnet_cifar", 36),
        ("resnet18", 64),
        ("vgg11", 64),
        ("mobilenet_v3_small", 64),
        ("densenet121", 64),
    ],
)
def test_nets_give_features_that_the_heads_take(name, size):
    model = registry.TwoHeads(registry.backbone(name, 8, "batch", size), 7, 16).eval()
    x = torch.randn(2, 3, size, size)
    plain, rebalanced, z, p = model.heads(x)
    assert (
        plain.shape == (2, 7)
        and z.shape == p.shape == (2, 16)
        and torch.equal(model(x), rebalanced)
    )


def test_resnet50_is_the_one_of_the_paper():
    model = registry.backbone("resnet50", 0, "", 224)
    norms = registry.norm_layers(model)
    assert len(norms) == 53 and sum(m.num_features for m in norms.values()) == 26560
    assert sum(p.numel() for p in model.parameters()) + 2049 * 1000 == 25_557_032


def test_resnet32_has_464_thousand_parameters():
    """He et al. 2016, table 6: 0.46 M for ResNet-32 on CIFAR-10."""
    assert (
        sum(
            p.numel()
            for p in registry.Student(registry.backbone("resnet32", 0, "", 32), 10).parameters()
        )
        == 464_154
    )


def conv(inputs, outputs, side=3):
    return outputs * (inputs * side * side + 1)


def count(name, size, norm="instance"):
    model = registry.Student(registry.backbone(name, 0, norm, size), 10)
    return sum(p.numel() for p in model.parameters())


def test_the_fields_networks_have_their_parameters():
    """By hand: 3×3 convolutions with biases, two numbers a channel for the norm, a linear layer."""
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    vgg = sum(conv(a, b) for a, b in pairwise(widths)) + 2 * sum(widths[1:]) + 513 * 10
    assert vgg == 9_231_114 == count("vgg11_cifar", 32) == count("vgg11_cifar", 32, "batch")
    assert count("vgg11_cifar", 64) == vgg, "larger images are averaged"
    alexnet = conv(3, 128, 5) + conv(128, 192, 5) + conv(192, 256) + conv(256, 192) + conv(192, 192)
    assert count("alexnet_cifar", 32) == alexnet + 10 * (192 * 4 * 4 + 1) == 1_872_202
    assert count("alexnet_cifar", 64) == alexnet + 10 * (192 * 8 * 8 + 1)
    # ResNet-18 with a 3×3 stem: two convolutions without biases a block, 1×1 ones in three shortcuts.
    resnet = 64 * 27 + 2 * 64 + 513 * 10
    for a, b in ((64, 64), (64, 128), (128, 256), (256, 512)):
        resnet += 9 * (a * b + 3 * b * b) + 4 * 2 * b + (a * b + 2 * b if a != b else 0)
    assert resnet == count("resnet18_cifar", 32) == count("resnet18_instance", 32)


@pytest.mark.parametrize("name", ["vgg11_cifar", "resnet18_instance", "alexnet_cifar"])
def test_without_batchnorm_images_do_not_see_each_other(name):
    """Weights and nothing else; the same logits alone and in a batch, with and without training."""
    model = registry.seeded(
        lambda: registry.Student(registry.backbone(name, 0, "instance", 32), 10), "n"
    )
    assert not list(model.buffers()) and not registry.norm_layers(model)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together = model(x)
        assert torch.allclose(model.eval()(x[1:2]), together[1:2], atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3, "it sees the image"


def test_vgg_honours_the_norm_and_resnet18_has_its_own():
    assert flops.norm_layers("vgg11_cifar", 0, "batch", 32) == 8
    assert flops.norm_layers("vgg11_cifar", 0, "instance", 32) == 0
    for norm in ("instance", "batch"):
        assert flops.norm_layers("resnet18_cifar", 0, norm, 32) == 20
        assert flops.norm_layers("resnet18_instance", 0, norm, 32) == 0
        assert flops.norm_layers("alexnet_cifar", 0, norm, 32) == 0


@pytest.mark.parametrize(("name", "side"), [("vgg11_cifar", 32), ("resnet18_instance", 9)])
def test_nothing_is_normalised_alone(name, side):
    """At the smallest side: the mean of one pixel is the pixel, so its norm would be 0."""
    seen = []
    model = registry.backbone(name, 0, "instance", side)
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_hook(lambda _, x, __: seen.append(x[0].shape[2:].numel()))
    with torch.no_grad():
        model(torch.randn(1, 3, side, side))
    assert min(seen) == 4 and len(seen) == (8 if name == "vgg11_cifar" else 20)


def test_instance_norm_is_per_image_and_channel():
    layer, x = registry._norm("instance", 4), torch.randn(3, 4, 5, 5) * 3 + 1
    assert torch.allclose(layer(x), nn.functional.instance_norm(x), atol=1e-5)


def test_unknown_and_too_small():
    with pytest.raises(UserError, match="unknown net 'resnet51'"):
        registry.backbone("resnet51", 8, "batch", 32)
    with pytest.raises(UserError, match="at least 16 pixels"):
        registry.backbone("convnet4", 8, "batch", 8)


def test_weights_depend_on_the_key_alone():
    def build():
        return registry.backbone("convnet3", 4, "batch", 8)

    torch.manual_seed(1)
    a = registry.seeded(build, "x", 0)
    torch.manual_seed(2)
    b, c = registry.seeded(build, "x", 0), registry.seeded(build, "x", 1)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)


def frozen_expert(folder, name="convnet3", norm="batch"):
    made_of = frozen.recipe(name, 4, norm, 8, 5)
    model = registry.TwoHeads(registry.backbone(name, 4, norm, 8), 5, 8).eval()
    frozen.save(folder / "weights.pt", made_of, model)
    return model, frozen.load(folder / "weights.pt", ALONE)


def test_a_saved_network_is_the_same_function_and_frozen(tmp_path):
    model, again = frozen_expert(tmp_path)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    plain, rebalanced, _, _ = model.heads(x)
    assert torch.equal(again.logits(x), rebalanced) and torch.equal(again.plain_logits(x), plain)
    assert not again.logits(x).requires_grad and not again.model.training
    assert not any(p.requires_grad for p in again.model.parameters())
    assert not hasattr(again.model, "projector") and not again.any_size
    assert again.recipe == {
        "net": "convnet3",
        "width": 4,
        "norm": "batch",
        "resolution": 8,
        "num_classes": 5,
    }
    shown = frozen.forward(again.model, x, ALONE)
    shown.sum().backward()
    assert torch.equal(shown, rebalanced) and x.grad.abs().sum() > 0, "gradients reach the images"


def test_a_student_can_be_loaded_too_and_saves_to_the_same_bytes(tmp_path):
    model = registry.Student(registry.backbone("resnet32", 0, "", 8), 5).eval()
    made_of = frozen.recipe("resnet32", 0, "", 8, 5)
    for name in "ab":
        frozen.save(tmp_path / name, made_of, model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again, x = frozen.load(tmp_path / "a", ALONE), torch.randn(2, 3, 8, 8)
    assert torch.equal(again.logits(x), model(x)) and torch.equal(again.plain_logits(x), model(x))
    assert again.any_size


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_mean_of_two_networks_is_that_of_their_logits(suffix, tmp_path):
    """Of two heads and of one, of any net: from two files, and from the one it is saved as."""
    (tmp_path / "a").mkdir()
    _, expert = frozen_expert(tmp_path / "a")
    student = registry.Student(registry.backbone("resnet32", 0, "", 8), 5).eval()
    frozen.save(tmp_path / "b.pt", frozen.recipe("resnet32", 0, "", 8, 5), student)
    paths, x = [tmp_path / "a" / "weights.pt", tmp_path / "b.pt"], torch.randn(3, 3, 8, 8)
    both = frozen.load_mean(paths, ALONE)
    wanted = (expert.logits(x) + student(x)) / 2
    assert torch.allclose(both.logits(x), wanted, atol=1e-6) and not both.logits(x).requires_grad
    assert [part["net"] for part in both.recipe["of"]] == ["convnet3", "resnet32"]
    assert not both.any_size, "convnet3 takes one side only"
    frozen.write(tmp_path / f"m{suffix}", *frozen.read_mean(paths))
    again = frozen.load(tmp_path / f"m{suffix}", ALONE)
    assert torch.equal(again.logits(x), both.logits(x)) and again.recipe == both.recipe
    assert torch.equal(frozen.load_mean(paths[:1], ALONE).logits(x), expert.logits(x))


def test_autocast_gives_float32_logits(tmp_path):
    _, exact = frozen_expert(tmp_path)
    half = frozen.load(tmp_path / "weights.pt", Ranks(0, 1, torch.device("cpu"), torch.bfloat16))
    x = torch.randn(4, 3, 8, 8)
    ours, theirs = half.logits(x), exact.logits(x)
    assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
    assert torch.allclose(ours, theirs, atol=0.1)


def test_predict_shows_every_image_once(tmp_path):
    model, network = frozen_expert(tmp_path)
    pixels = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    images = MemoryImages(pixels, np.zeros(7, np.int64), torch.device("cpu"))

    def normalize(x):
        return x - 0.5

    plain, wanted, _, _ = model.heads(pixels.float() / 255 - 0.5)
    for shown, expected in ((network, wanted), (model, wanted), (network.plain_logits, plain)):
        logits = frozen.predict(shown, images, normalize, ALONE, batch=3)
        assert not logits.requires_grad
        assert logits.shape == (7, 5) and torch.allclose(logits, expected, atol=1e-6)


def test_a_damaged_network_is_refused(tmp_path):
    frozen_expert(tmp_path)
    path = tmp_path / "weights.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        frozen.load(path, ALONE)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("alexnet", 32, "alexnet cannot take images of 32 pixels: .* raise data.resolution"),
        ("vit_b_16", 64, "vit_b_16 cannot take images of 64 pixels"),
        ("convnet4", 8, "at least 16 pixels"),
        (
            "vgg11_cifar",
            31,
            "vgg11_cifar needs images of at least 32 pixels, not 31",
        ),
        ("alexnet_cifar", 7, "alexnet_cifar needs images of at least 8 pixels"),
        ("resnet18_instance", 8, "resnet18_instance needs images of at least 9 pixels"),
        ("squeezenet1_0", 224, "does not end in a linear layer"),
        ("resnet51", 32, "unknown net"),
    ],
)
def test_a_net_that_cannot_take_the_images_is_told_in_one_line(name, size, words):
    for _ in range(2):  # the second answer is remembered
        with pytest.raises(UserError, match=words) as caught:
            registry.check(name, 8, "batch", size)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnet3", 64),
        ("resnet18_cifar", 64),
        ("resnet18_instance", 64),
        ("vgg11_cifar", 64),
        ("alexnet_cifar", 64),
        ("regnet_x_400mf", 64),
        ("vit_b_16", 224),
    ],
)
def test_nets_are_checked_without_data(name, size):
    """The draws of other networks are not disturbed, and no weights are made."""
    before = torch.get_rng_state()
    registry.check(name, 8, "batch", size)
    assert torch.equal(torch.get_rng_state(), before)
    with registry.on_meta(name):
        model = registry.backbone(name, 8, "batch", size)
    assert all(v.device.type == "meta" for v in model.state_dict().values())
    real = registry.backbone("convnet3", 8, "batch", 64)
    assert all(v.device.type == "cpu" for v in real.state_dict().values())


def test_flops_of_known_networks():
    """torchvision's documentation: ResNet-50 has 4.09 GFLOPS (multiply-adds) and 25.6 M weights."""
    assert flops.forward("resnet50", 0, "", 224) == pytest.approx(2 * 4.09e9, rel=2e-3)
    assert flops.parameters("resnet50", 0, "", 224) + 2049 * 1000 == 25_557_032
    assert flops.features("resnet50", 0, "", 224) == 2048
    assert flops.norm_layers("resnet50", 0, "", 224) == 53
    assert flops.norm_layers("convnet3", 8, "instance", 32) == 0


def test_activations_of_a_convnet():
    """Convolution, norm, ReLU [8, R, R], then the average pooling [8, R/2, R/2]; the flat output."""
    expected = sum(3 * 8 * side**2 + 8 * side**2 / 4 for side in (32, 16, 8)) + 8 * 4 * 4
    assert flops.activations("convnet3", 8, "batch", 32) == 4 * expected


def test_the_average_follows():
    """Also after both were loaded: their tensors stay."""
    b = nn.BatchNorm1d(3)
    nn.init.constant_(b.weight, 1.0)
    average = Average(b)
    a = average.network
    a.load_state_dict({**a.state_dict(), "weight": torch.zeros(3)})
    b.load_state_dict({**b.state_dict(), "weight": torch.full((3,), 2.0)})
    b.running_mean.fill_(2.0)
    b.num_batches_tracked.fill_(7)
    average.update(0.75)
    assert not a.weight.requires_grad and b.weight.requires_grad
    assert (
        torch.allclose(a.weight, torch.full((3,), 0.5))
        and torch.allclose(a.running_mean, torch.full((3,), 0.5))
        and int(a.num_batches_tracked) == 7
    )


@pytest.mark.parametrize(
    ("net", "norm", "size", "able"),
    [("resnet18_cifar", "batch", 8, False), ("resnet18_cifar", "batch", 16, True), ("convnet3", "batch", 8, True), ("convnet3", "instance", 8, True)],
)  # fmt: skip
def test_a_batch_of_one_image_does_not_train_batchnorm_on_maps_of_one_pixel(net, norm, size, able):
    network = registry.Student(registry.backbone(net, 4, norm, size), 10)
    before = torch.get_rng_state()
    assert registry.trains_on_one(network, size) is able
    assert torch.equal(before, torch.get_rng_state()) and network.training
    if able:
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 10)
    else:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            network(torch.zeros(1, 3, size, size))
