"""Paired statistics: planted differences are found, chance is not, and figures worked out by hand come out."""

import math
import random

import pytest

from compresso.paired import difference, standard_error, together


def test_right_and_wrong_by_hand():
    """Six documents lost, one gained, of twenty."""
    a = [1.0] * 10 + [0.0] * 10
    b = [1.0] * 4 + [0.0] * 6 + [1.0] + [0.0] * 9
    found = difference(a, b)
    assert found.difference == pytest.approx(-0.25)
    p, q = 2 / 22, 7 / 22  # one added to each kind of discordant pair, two to the whole (Bonett and Price 2012)
    reach = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 22)
    assert (found.low, found.high) == (pytest.approx(p - q - reach), pytest.approx(p - q + reach))
    assert found.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # McNemar: at most 1 of 7, both sides


def test_continuous_by_hand():
    found = difference([0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 2.0])
    assert found.difference == 2.0
    reach = 3.182446 * math.sqrt(2 / 3 / 4)  # t of 3 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(2 - reach, abs=1e-5), pytest.approx(2 + reach, abs=1e-5))


@pytest.mark.parametrize("binary", [True, False])
def test_a_planted_difference_is_found_where_separate_errors_would_drown_it(binary):
    rng = random.Random(0)
    hardness = [rng.random() for _ in range(400)]
    if binary:
        a = [float(h < 0.5) for h in hardness]
        b = [float(h < 0.54) for h in hardness]
    else:
        a = [10 * h for h in hardness]
        b = [10 * h + 0.1 + 0.02 * rng.random() for h in hardness]
    found = difference(a, b)
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.01
    assert found.difference < 2 * standard_error(a), "an unpaired comparison would have missed it"


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_cover_the_truth_about_as_often_as_they_say(binary):
    rng = random.Random(1)
    covered, alarms, repeats = 0, 0, 400
    for _ in range(repeats):
        hardness = [rng.random() for _ in range(60)]
        noisy = [[h + 0.3 * rng.random() for h in hardness] for _ in range(2)]
        a, b = [[float(v < 0.6) for v in scores] if binary else scores for scores in noisy]
        found = difference(a, b)
        covered += found.low <= 0 <= found.high
        alarms += found.p_value < 0.05
    assert 0.92 <= covered / repeats <= 0.995
    assert alarms / repeats < 0.08


def test_no_difference_at_all_is_not_certainty():
    found = difference([1.0] * 10, [1.0] * 10)
    assert found.difference == 0
    assert found.low < -0.1
    assert found.high > 0.1
    assert found.p_value == 1


def test_a_weighted_mean_of_parts():
    parts = [difference([0.0] * 50, [float(i % 5 == 0) for i in range(50)]), difference([0.0] * 50, [0.0] * 50)]
    found = together(parts, [3, 1])
    assert found.difference == pytest.approx(0.15)
    p, q = 11 / 52, 1 / 52  # of the first part; of the second both are 1 / 52
    assert found.variance == pytest.approx(9 / 16 * (p + q - (p - q) ** 2) / 52 + 1 / 16 * 2 * q / 52)
    assert found.low < 0.15 < found.high
    assert found.n == 100


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="same two documents or more, got 3 and 2"):
        difference([1, 0, 1], [1, 0])


def test_standard_error_is_lm_evals():
    from lm_eval.api.metrics import mean_stderr

    scores = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert standard_error(scores) == pytest.approx(mean_stderr(scores))


def test_a_mean_of_differences_without_a_discordant_document_has_an_interval():
    """Few documents that all agree do not prove that two models are equal."""
    found = together([difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])] * 2, [1.0, 1.0])
    assert found.low < -0.2
    assert found.high > 0.2
