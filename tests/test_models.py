import pytest
import torch
from torch import nn

from ltdd_scale.errors import UserError
from ltdd_scale.models import registry


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnet3", 16),
        ("convnet4", 32),
        ("resnet32", 32),
        ("resnet18_cifar", 32),
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


def test_instance_norm_is_per_image_and_channel():
    layer, x = registry._norm("instance", 4), torch.randn(3, 4, 5, 5) * 3 + 1
    assert torch.allclose(layer(x), nn.functional.instance_norm(x), atol=1e-5)


def test_unknown_and_too_small():
    with pytest.raises(UserError, match="unknown net 'resnet51'"):
        registry.backbone("resnet51", 8, "batch", 32)
    with pytest.raises(UserError, match="at least 16 pixels"):
        registry.backbone("convnet4", 8, "batch", 8)


def test_weights_depend_on_the_key_alone():
    build = lambda: registry.backbone("convnet3", 4, "batch", 8)  # noqa: E731
    torch.manual_seed(1)
    a = registry.seeded(build, "x", 0)
    torch.manual_seed(2)
    b, c = registry.seeded(build, "x", 0), registry.seeded(build, "x", 1)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)


def test_the_saved_recipe_builds_the_same_network():
    recipe = registry.Network.describe("convnet3", 4, "batch", 8, 5)
    model = registry.TwoHeads(registry.backbone("convnet3", 4, "batch", 8), 5, 8).eval()
    again = registry.Network.build(recipe, model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), again(x)) and not any(p.requires_grad for p in again.parameters())


def test_the_average_follows():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(b.weight, 3.0)
    b.running_mean.fill_(2.0)
    b.num_batches_tracked.fill_(7)
    registry.update_ema(a, b, 0.75)
    assert (
        torch.allclose(a.weight, torch.full((3,), 1.5))
        and torch.allclose(a.running_mean, torch.full((3,), 0.5))
        and int(a.num_batches_tracked) == 7
    )
