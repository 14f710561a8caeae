"""Hard concrete gates: relaxed Bernoulli masks that reach exact 0 and exact 1.

A gate is one number per prunable unit (a GQA group, an FFN channel, a hidden
channel). Nothing here knows about transformers: `log_alpha` goes in; gates and
probabilities of the same shape come out.

Louizos et al. 2018, https://arxiv.org/abs/1712.01312, section 3; constants as in
Compresso, https://arxiv.org/abs/2310.05015, equation 4.
"""

import math

import torch
from torch import Tensor

LEFT, RIGHT = -0.1, 1.1  # stretch past [0, 1] so that the clamp puts mass on both ends
TEMPERATURE = 2 / 3
LIMIT = 8.0  # bounds of log_alpha; the published 4.6 keeps every unit's gate noisy for ever
EPSILON = 1e-6  # noise and probabilities stay this far from 0 and 1


def sample(log_alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one gate per unit; the gradient flows to log_alpha by reparametrisation.

    The noise is drawn on the generator's device (CPU without one), so that the same
    seed gives the same gates on every kind of machine.
    """
    device = generator.device if generator is not None else "cpu"
    u = torch.empty(log_alpha.shape, device=device).uniform_(EPSILON, 1 - EPSILON, generator=generator)
    noise = (u.log() - torch.log1p(-u)).to(log_alpha)
    s = torch.sigmoid((noise + log_alpha) / TEMPERATURE)
    return (s * (RIGHT - LEFT) + LEFT).clamp(0, 1)


def _cdf(log_alpha: Tensor, x: float) -> Tensor:
    """P(stretched gate <= x) before the clamp."""
    unstretched = (x - LEFT) / (RIGHT - LEFT)
    logit = math.log(unstretched) - math.log1p(-unstretched)
    return torch.sigmoid(TEMPERATURE * logit - log_alpha).clamp(EPSILON, 1 - EPSILON)


def prob_zero(log_alpha: Tensor) -> Tensor:
    """P(gate = 0), elementwise."""
    return _cdf(log_alpha, 0.0)


def prob_open(log_alpha: Tensor) -> Tensor:
    """P(gate > 0), elementwise: what the sparsity penalty counts."""
    return 1 - prob_zero(log_alpha)


def prob_one(log_alpha: Tensor) -> Tensor:
    """P(gate = 1), elementwise."""
    return 1 - _cdf(log_alpha, 1.0)


def gate_value(log_alpha: Tensor) -> Tensor:
    """The deterministic soft value of a kept gate: sigmoid(0.8 log_alpha / temperature).

    The factor 0.8 is that of Wang et al. 2020, https://arxiv.org/abs/1910.04732.
    """
    return torch.sigmoid(0.8 * log_alpha / TEMPERATURE)
