import pytest
import torch

from ltdd_scale.errors import UserError
from ltdd_scale.models import registry
from ltdd_scale.models.flat import Flat


def test_a_vector_gives_what_the_network_gives():
    flat = Flat("convnet3", 8, "instance", 16, 5)
    theta = flat.initial("a", 1)
    net = registry.seeded(
        lambda: registry.Student(registry.backbone("convnet3", 8, "instance", 16), 5), "a", 1
    )
    x = torch.randn(4, 3, 16, 16)
    assert theta.shape == (flat.size,) and torch.equal(theta, flat.initial("a", 1))
    assert not torch.equal(theta, flat.initial("a", 2))
    assert torch.equal(flat.logits(theta, x), net(x))
    features = flat.features(theta, x)
    assert torch.equal(features, net.backbone(x))
    torch.testing.assert_close(flat.classify(theta[flat.head], features), net(x))
    assert flat.backbone.stop == sum(p.numel() for p in net.backbone.parameters())


def test_the_gradient_of_the_vector_is_that_of_the_parameters():
    flat = Flat("convnet3", 4, "instance", 8, 3)
    theta = flat.initial("b").requires_grad_()
    net = registry.seeded(
        lambda: registry.Student(registry.backbone("convnet3", 4, "instance", 8), 3), "b"
    )
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    (ours,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(flat.logits(theta, x), y), theta
    )
    torch.nn.functional.cross_entropy(net(x), y).backward()
    theirs = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    torch.testing.assert_close(ours, theirs)


def test_running_statistics_are_refused():
    with pytest.raises(UserError, match="has BatchNorm"):
        Flat("convnet3", 8, "batch", 16, 5)
    with pytest.raises(UserError, match="resnet32 with norm=instance has BatchNorm"):
        Flat("resnet32", 8, "instance", 16, 5)
