"""The method's mathematics on tensors, against plain Python."""

import math

import pytest
import torch

from tests import brute_force
from utils import tilting


def test_top_k_probs_come_from_the_full_softmax_and_are_not_renormalised():
    logits = torch.tensor([[0.0, 3.0, 1.0, -2.0], [5.0, 5.5, -1.0, 0.0]], dtype=torch.float64)
    p_ref, token_ids = tilting.top_k_probs(logits, 2, temperature=2.0)
    for row in range(2):
        z = [math.exp(float(x) / 2) for x in logits[row]]
        assert token_ids[row].tolist() == sorted(range(4), key=lambda i: -z[i])[:2]
        assert p_ref[row].tolist() == pytest.approx([z[i] / sum(z) for i in token_ids[row].tolist()], abs=1e-12)
    assert (p_ref.sum(-1) < 1).all()


def test_more_candidates_than_tokens_keeps_all_tokens():
    assert tilting.top_k_probs(torch.zeros(1, 4), 15)[0].shape == (1, 4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_cannot_divide_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        tilting.top_k_probs(torch.zeros(1, 4), 2, temperature)


def test_half_precision_logits_are_normalised_in_float32():
    assert tilting.top_k_probs(torch.zeros(1, 4, dtype=torch.bfloat16), 2)[0].dtype == torch.float32


def test_normalisations_by_hand():
    values = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    assert tilting.normalize_values(values, "minmax")[0].tolist() == pytest.approx(
        [0, 2 / (2 + 1e-6), 1 / (2 + 1e-6)], abs=1e-12
    )
    std = math.sqrt(2 / 3)
    assert tilting.normalize_values(values, "zscore")[0].tolist() == pytest.approx(
        [-1 / (std + 1e-6), 1 / (std + 1e-6), 0], abs=1e-12
    )
    assert tilting.normalize_values(values, "none") is values
    with pytest.raises(ValueError, match="minmax"):
        tilting.normalize_values(values, "minimax")


def test_equal_values_leave_the_reference_as_it_is():
    p_ref = torch.tensor([[0.5, 0.3]], dtype=torch.float64)
    for mode in tilting.NORMALIZATIONS:
        u = tilting.normalize_values(torch.full((1, 2), 7.0, dtype=torch.float64), mode)
        assert tilting.tilt(p_ref, u, 4.0)[0].tolist() == pytest.approx([0.625, 0.375], abs=1e-12)


def test_tilt_is_reference_times_exponential_and_never_overflows():
    p_ref, u = (
        torch.tensor([[0.5, 0.2, 0.1]], dtype=torch.float64),
        torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64),
    )
    odds = [0.5, 0.2 * math.exp(3), 0.1 * math.exp(1.5)]
    assert tilting.tilt(p_ref, u, 3.0)[0].tolist() == pytest.approx([o / sum(odds) for o in odds], abs=1e-12)
    assert tilting.tilt(p_ref, u, 1e5)[0].tolist() == pytest.approx([0, 1, 0], abs=1e-12)
    with pytest.raises(ValueError, match="finite"):
        tilting.tilt(p_ref, u, math.nan)


def test_v1_without_normalisation_clips_at_six_over_beta():
    values = torch.tensor([[1.0, 3.0]])
    assert tilting.clip_values(values, 3.0).tolist() == [[1.0, 2.0]]
    assert tilting.clip_values(values, 3.0, clip=None) is values
    assert tilting.clip_values(values, 0.0) is values


def test_log_ratio_counts_the_top_k_cut_even_without_a_tilt():
    p_ref = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    p_tilt = tilting.tilt(p_ref, torch.zeros_like(p_ref), 0.0)
    assert float(tilting.log_ratio(p_tilt, p_ref, torch.tensor([0]))) == pytest.approx(math.log(1 / 0.75), abs=1e-12)
    assert float(tilting.step_kl(p_tilt, p_ref)) == pytest.approx(math.log(1 / 0.75), abs=1e-12)


def test_uniforms_are_the_documented_hash():
    keys = [(0, 1, 2), (3,), (-5, 7)]
    folded = torch.tensor([tilting.fold_key(k) for k in keys])
    for step in (0, 1, 1000):
        expected = [brute_force.uniform(k, step) for k in keys]
        assert tilting.uniforms(folded, torch.full((3,), step)).tolist() == expected


def test_uniforms_look_uniform_and_independent_over_keys_and_steps():
    """20,000 draws: the mean's standard error is 0.00204, a lag correlation's 0.0071; bounds are five of them."""
    folded = torch.tensor([tilting.fold_key((0, i)) for i in range(200)])
    u = torch.stack([tilting.uniforms(folded, torch.full((200,), t)) for t in range(100)])  # (steps, keys)
    assert ((u >= 0) & (u < 1)).all()
    assert abs(float(u.mean()) - 0.5) < 5 * 0.00204
    assert abs(float(torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1])) < 5 * 0.0071
    assert abs(float(torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1])) < 5 * 0.0071


def test_sampling_inverts_the_cumulative_distribution():
    probs = torch.tensor([[0.2, 0.3, 0.5]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.5001, 1 - 2**-53], dtype=torch.float64)
    assert tilting.sample(probs, uniform).tolist() == [0, 0, 1, 2, 2]
    assert tilting.sample(2 * probs, uniform).tolist() == [0, 0, 1, 2, 2]  # need not be normalised
    assert tilting.sample(torch.tensor([[0.0, 1.0]]), torch.tensor([0.0])).tolist() == [
        1
    ]  # never a token of probability 0
