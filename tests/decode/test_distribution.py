"""Probabilities of logits, and the token at a place among weights."""

import pytest
import torch

from medusa_exp.decode.distribution import probabilities, token_at


def test_filters_are_those_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = torch.randn(50, 20, generator=torch.manual_seed(0), dtype=torch.float64)
    for k, p, temperature in [(5, 0.6, 0.7), (20, 0.95, 1.3), (1, 0.5, 1.0), (50, 1.0, 2.0)]:
        warped_BV = logits_BV
        for warper in (
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(k),
            TopPLogitsWarper(p),
        ):
            warped_BV = warper(None, warped_BV)
        torch.testing.assert_close(
            probabilities(logits_BV, temperature, k, p), warped_BV.softmax(-1)
        )


def test_a_filter_that_keeps_everything_keeps_everything():
    """In float32 the sum of many probabilities passes 1 before the last."""
    logits_V = torch.randn(50_000, generator=torch.manual_seed(0)) * 4
    assert torch.equal(probabilities(logits_V, 1.0, None, 1.0), probabilities(logits_V, 1.0))


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-46])
def test_a_tiny_temperature_leaves_the_likeliest_token_alone(temperature):
    logits_V = torch.tensor([1.0, 5.0, 4.9, -3.0, 5.0])
    assert probabilities(logits_V, temperature).tolist() == [0, 0.5, 0, 0, 0.5]


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_where_no_token_can_be_it_is_the_first(value):
    p_RV = probabilities(torch.full((2, 5), value), 1.0)
    assert p_RV.tolist() == [[1, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_row_that_is_no_number_changes_no_other(temperature):
    """Where all maxima are finite a CPU takes a shorter way."""
    logits_BV = 3 * torch.randn(4, 300, generator=torch.manual_seed(1))
    logits_BV[2, :7] = -torch.inf
    alone = probabilities(logits_BV, temperature)
    for value in (torch.inf, torch.nan):
        with_one = torch.cat([logits_BV, torch.full((1, 300), value)])
        torch.testing.assert_close(probabilities(with_one, temperature)[:4], alone)
    expected = (logits_BV.double() / temperature).softmax(-1)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-9)


def test_all_tokens_of_a_row_are_found_with_their_weights():
    weights_1V = torch.zeros(1, 700, dtype=torch.float64)
    weights_1V[0, [3, 255, 256, 600]] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    places = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999, 7.0])
    p_1V = torch.zeros(1, 700)
    p_1V[0, 9] = 1.0  # is not asked
    found = token_at(weights_1V.expand(9, -1), places[:, None], p_1V.expand(9, -1))
    assert found.tolist() == [3, 3, 255, 255, 256, 256, 600, 600, 600]


def test_where_no_weight_is_left_the_likeliest_token_comes():
    p_RV = torch.rand(2, 300)
    p_RV[0, 299], p_RV[1, 5] = 2, 2
    assert token_at(torch.zeros(2, 300), torch.tensor([[0.0], [0.5]]), p_RV).tolist() == [299, 5]
