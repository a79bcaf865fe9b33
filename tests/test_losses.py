import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltdd_scale.experts import losses


def test_class_weights_have_the_factor_c():
    w = losses.class_weights(np.asarray([100, 10, 1]), 0.8).numpy()
    r = np.asarray([100, 10, 1]) / 111
    assert np.allclose(w, 3 * r**-0.8 / (r**-0.8).sum(), rtol=1e-6) and math.isclose(
        w.mean(), 1, rel_tol=1e-6
    )


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_debias_is_its_formula_written_out(progress):
    torch.manual_seed(0)
    n, c = 5, 4
    plain, rebalanced, y, w = (
        torch.randn(n, c),
        torch.randn(n, c),
        torch.rand(n, c).softmax(1),
        torch.rand(c),
    )
    total = 0.0
    for i in range(n):
        p, q = plain[i].softmax(0), rebalanced[i].softmax(0)
        for k in range(c):
            total += progress**2 * w[k] * -y[i, k] * math.log(q[k]) + (1 - progress**2) * -y[
                i, k
            ] * math.log(p[k])
    assert math.isclose(
        float(losses.debias(plain, rebalanced, y, w, progress)), float(total) / n, rel_tol=1e-5
    )


def test_robust_is_minus_the_cosine_of_the_other_view_without_its_gradient():
    torch.manual_seed(0)
    p, z = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    loss = losses.robust(p, z)
    expected = -2 * np.mean(
        [float(F.cosine_similarity(p[i], z[(i + 3) % 6], 0).detach()) for i in range(6)]
    )
    assert math.isclose(float(loss.detach()), expected, rel_tol=1e-5)
    loss.backward()
    assert z.grad is None and p.grad is not None


def test_the_objective_weighs_its_terms():
    torch.manual_seed(0)
    plain, rebalanced = torch.randn(6, 4), torch.randn(6, 4)
    z, p, y = torch.randn(6, 8), torch.randn(6, 8), torch.rand(6, 4).softmax(1)
    weights = torch.rand(4)
    objective = losses.Debiased(3.0, 0.5, weights)
    loss, biased, contrast = objective((plain, rebalanced, z, p), y, 0.4)
    assert torch.equal(biased, losses.debias(plain, rebalanced, y, weights, 0.4))
    assert torch.equal(contrast, losses.robust(p, z))
    assert float(loss) == pytest.approx(float(6 * biased + contrast / 2))
    without = objective((plain, rebalanced, None, None), y, 0.4)
    assert float(without[0]) == pytest.approx(float(6 * biased)) and without[2] == 0


def test_a_balanced_softmax_takes_the_prior_out_of_the_logits():
    """p(y|x) of training is ∝ π_y exp(z_y): with it, the loss is that of the definition."""
    torch.manual_seed(0)
    logits, y = torch.randn(6, 4), F.one_hot(torch.tensor([0, 1, 2, 3, 0, 0]), 4).float()
    prior = torch.tensor([0.6, 0.2, 0.15, 0.05])
    heads = (torch.randn(6, 4), logits, None, None)
    loss, same, contrast = losses.Balanced(prior.log())(heads, y, 0.5)
    weighed = prior * logits.exp()
    expected = -(weighed / weighed.sum(1, keepdim=True))[y.bool()].log().mean()
    assert torch.allclose(loss, expected) and torch.equal(loss, same) and contrast == 0
    plain = losses.Balanced(torch.zeros(4))(heads, y, 0.5)[0]
    assert torch.allclose(plain, F.cross_entropy(logits, y))
