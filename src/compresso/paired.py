"""Two models on the same documents: how large is the difference, and how sure is it?

Scores of one document go together, so what is hard for both models does not widen the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Difference:
    """Mean of b - a over `n` documents, its 95 % interval, and P(at least as far off | no difference)."""

    difference: float
    low: float
    high: float
    variance: float
    """Of the mean, as a weighted mean takes it."""
    p_value: float
    n: int
    method: str


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two models' scores, document by document; at least two documents.

    Right/wrong scores: the interval of Bonett and Price 2012 (Journal of Educational and Behavioral
    Statistics 37), which does not shrink to nothing where few documents differ, and McNemar's
    exact test. Other scores: paired t.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a paired comparison needs the same two documents or more, got {len(a)} and {len(b)} scores")
    return _binary(a, b) if {*a, *b} <= {0.0, 1.0} else _continuous(a, b)


def _binary(a: Sequence[float], b: Sequence[float]) -> Difference:
    n = len(a)
    gained = sum(y > x for x, y in zip(a, b, strict=True))
    lost = sum(y < x for x, y in zip(a, b, strict=True))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    variance = (p + q - (p - q) ** 2) / (n + 2)  # not 0 where no document differs
    reach = Z * math.sqrt(variance)
    mean = (gained - lost) / n
    p_value = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    low, high = max(-1.0, p - q - reach), min(1.0, p - q + reach)
    return Difference(mean, low, high, variance, float(p_value), n, "Bonett-Price, McNemar exact")


def _continuous(a: Sequence[float], b: Sequence[float]) -> Difference:
    n = len(a)
    parts = [y - x for x, y in zip(a, b, strict=True)]
    mean = sum(parts) / n
    variance = sum((part - mean) ** 2 for part in parts) / (n - 1) / n
    error = math.sqrt(variance)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Difference(mean, mean - reach, mean + reach, variance, p_value, n, "paired t")


def together(parts: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """The weighted mean of independent differences (tasks of a suite, parts of a group)."""
    whole = sum(weights)
    shares = [weight / whole for weight in weights]
    mean = sum(share * part.difference for share, part in zip(shares, parts, strict=True))
    variance = sum(share**2 * part.variance for share, part in zip(shares, parts, strict=True))
    error = math.sqrt(variance)
    p_value = 2 * float(stats.norm.sf(abs(mean) / error)) if error else float(mean == 0)
    n = sum(part.n for part in parts)
    return Difference(mean, mean - Z * error, mean + Z * error, variance, p_value, n, "weighted mean, normal")


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of these scores; as lm-eval's, from the sample's deviation."""
    n = len(scores)
    if n < 2:
        return float("nan")
    mean = sum(scores) / n
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)
