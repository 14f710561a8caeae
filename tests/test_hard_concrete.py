"""The gates have the distribution that they are named after."""

import pytest
import torch

from compresso import hard_concrete as hc

# log_alpha, P(z = 0), P(z > 0), P(z = 1), soft value: Compresso's constants, by hand
TABLE = [
    (10, 0.000009, 0.999991, 0.99978, 0.99999),
    (4.60517, 0.002018, 0.997982, 0.95287, 0.99603),
    (4.59512, 0.002038, 0.997962, 0.95242, 0.99599),
    (2, 0.026633, 0.973367, 0.59902, 0.91683),
    (1, 0.069229, 0.930771, 0.35466, 0.76852),
    (0, 0.168178, 0.831822, 0.16818, 0.5),
    (-1, 0.354665, 0.645335, 0.06923, 0.23148),
    (-2, 0.599025, 0.400975, 0.02663, 0.08317),
    (-4.60517, 0.952870, 0.047130, 0.00202, 0.00397),
]


@pytest.mark.parametrize(("log_alpha", "zero", "open_", "one", "soft"), TABLE)
def test_probabilities_have_the_published_values(log_alpha, zero, open_, one, soft):
    a = torch.tensor(float(log_alpha), dtype=torch.float64)
    for function, value in ((hc.prob_zero, zero), (hc.prob_open, open_), (hc.prob_one, one), (hc.gate_value, soft)):
        assert float(function(a)) == pytest.approx(value, abs=1e-5), function.__name__


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 3.0])
def test_samples_are_zero_and_one_as_often_as_the_formulas_say(log_alpha):
    n = 1_000_000
    z = hc.sample(torch.full((n,), log_alpha), torch.Generator().manual_seed(1))
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1
    for seen, expected in (
        ((z == 0).double().mean(), hc.prob_zero(torch.tensor(log_alpha))),
        ((z == 1).double().mean(), hc.prob_one(torch.tensor(log_alpha))),
    ):
        three_sigma = 3 * (float(expected) * (1 - float(expected)) / n) ** 0.5
        assert float(seen) == pytest.approx(float(expected), abs=three_sigma)


def test_the_same_seed_draws_the_same_gates_and_the_gradient_reaches_log_alpha():
    a = torch.zeros(1000, requires_grad=True)
    first, second = (hc.sample(a, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    first.sum().backward()
    between = (first > 0) & (first < 1)
    assert (a.grad[between] > 0).all()
    assert (a.grad[~between] == 0).all()
