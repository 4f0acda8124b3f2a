"""Numbers: float32 beside float64 on long texts, half-precision values that nearly agree, and what is not finite."""

import itertools
import math
import re

import pytest
import torch

from tests.models_for_tests import VOCAB, causal_lm, value_model
from utils import tilting
from utils.decoding import beam_search, decode
from utils.errors import DataError
from utils.growth import TreeShape, grow_trees
from utils.policies import MavisPolicy, ReferencePolicy, TokenTablePolicy

STEPS, K, TOKENS = 2048, 15, 32000
EPS32 = torch.finfo(torch.float32).eps  # 1.2e-7


def generator(seed):
    return torch.Generator().manual_seed(seed)


def long_sequence(dtype, normalization, seed=0):
    """(STEPS,) log-ratios of what a tilted policy chose in one long text, whose logits and values are float32 numbers,
    and (STEPS, K) its distributions."""
    g = generator(seed)
    total, ratios = [], []
    for start in range(0, STEPS, 128):
        logits = (4 * torch.randn(128, TOKENS, generator=g)).to(dtype)
        values = torch.randn(3, 128, K, generator=g).to(dtype)
        p_ref, _ = tilting.top_k_probs(logits, K, 0.7)
        combined = tilting.combine(values, torch.tensor([0.5, 0.3, 0.2], dtype=dtype))
        p_tilt = tilting.tilt(p_ref, tilting.normalize_values(combined, normalization), 4.0)
        choice = (torch.arange(128) * 7 + start) % K  # whatever is chosen: rare candidates too
        ratios.append(tilting.log_ratio(p_tilt, p_ref, choice).double())
        total.append(p_tilt.double())
    return torch.cat(ratios), torch.cat(total)


@pytest.mark.parametrize("normalization", tilting.NORMALIZATIONS)
def test_log_ratios_of_a_long_text_in_float32_agree_with_float64(normalization):
    """A step's log-ratio is within 32 units of the last place of its larger logarithm (about 20), so within 8e-5; the
    sum over T steps is within the square root of T times that, since the roundings of different steps are independent
    (5 of these deviations are allowed), and the sum itself is taken in float64, which adds nothing."""
    (low, p_low), (high, p_high) = (long_sequence(d, normalization) for d in (torch.float32, torch.float64))
    step = 32 * EPS32 * 20
    assert (low - high).abs().max() < step
    assert abs(low.sum() - high.sum()) < 5 * step * math.sqrt(STEPS) / 10
    assert (p_low.sum(-1) - 1).abs().max() < 16 * EPS32
    assert (p_low - p_high).abs().max() < step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", tilting.NORMALIZATIONS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 64.0, 1e6])
def test_half_precision_values_that_nearly_agree_give_a_finite_normalised_tilt(dtype, normalization, beta):
    g = generator(1)
    p_ref, _ = tilting.top_k_probs(torch.randn(8, 100, generator=g), K)
    base = torch.tensor([0.0, 1.0, -3.0, 1e-3, 200.0, -6e4, 1e-7, 0.25])[:, None].to(dtype)  # (8, 1)
    step = torch.finfo(dtype).eps * base.abs().float()
    near = (base.float() + step * torch.randint(0, 2, (8, K), generator=g)).to(dtype)  # one unit in the last place
    same = base.expand(8, K)
    for values in (near, same):
        wide = values.float()[None]  # as a policy widens them before it combines
        combined = tilting.combine(wide, torch.ones(1))
        u = tilting.normalize_values(tilting.clip_values(combined, beta), normalization)
        p = tilting.tilt(p_ref, u, beta)
        assert p.isfinite().all() and (p.sum(-1) - 1).abs().max() < 16 * EPS32
    # Equal values leave the reference, renormalised. A z-score's mean is rounded, which beta magnifies in all alike.
    assert torch.allclose(p, p_ref / p_ref.sum(-1, keepdim=True), atol=16 * EPS32)


def test_no_beta_and_no_value_overflows():
    p_ref = torch.tensor([[0.5, 0.3, 0.2]])
    for values, expected in (([0.0, 3e38, 0.0], [0, 1, 0]), ([-3e38, -3e38, -3e38], [0.5, 0.3, 0.2])):
        p = tilting.tilt(p_ref, torch.tensor([values]), 1e30)
        assert torch.allclose(p, torch.tensor([expected], dtype=torch.float32))


# ------------------------------------------------------------------------------------------------------ not finite

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
KEYS = [(0, 40 + i, 0) for i in range(3)]
OPTIONS = {"keys": KEYS, "max_new_tokens": 6, "eos_token_id": None, "batch_size": 2}


class Broken(torch.nn.Module):
    """A head that gives `bad` for one token and an ordinary number elsewhere."""

    def __init__(self, head, bad):
        super().__init__()
        self.head, self.bad = head, bad

    def forward(self, hidden):
        scores = self.head(hidden)
        return torch.where(scores > scores.amax(-2, keepdim=True) - 1e-12, self.bad, scores)


def steered(bad, objective, **options):
    models = {name: value_model("llama_grouped_tied", seed) for seed, name in enumerate(("help", "harm"), start=1)}
    models[objective].score = Broken(models[objective].score, bad)
    reference = causal_lm("llama_grouped_tied")
    return MavisPolicy(reference, models, {"help": 0.5, "harm": 0.5}, beta=2.0, top_k=6, **options)


@pytest.mark.parametrize(
    ("bad", "normalization", "objective"),
    [
        *itertools.product([math.nan, math.inf, -math.inf], tilting.NORMALIZATIONS, ["harm"]),
        (math.nan, "minmax", "help"),
    ],
)
def test_a_value_that_is_not_finite_stops_decoding_and_names_prompt_and_objective(bad, normalization, objective):
    """An infinity too, which a clip would make an ordinary number of, and of which `none` would choose nothing."""
    policy = steered(bad, objective, normalization=normalization)
    with pytest.raises(DataError, match=f"prompt 4[0-2]: the values of {objective} are not finite"):
        decode(policy, PROMPTS, **OPTIONS)
    with pytest.raises(DataError, match=f"prompt 4[0-2]: the values of {objective} are not finite"):
        beam_search(policy, PROMPTS, num_beams=2, num_return=1, **OPTIONS)
    with pytest.raises(DataError, match=f"prompt 7: the values of {objective}"):
        list(grow_trees(policy, {7: [5, 6]}, {7: "x"}, TreeShape(2, 2, 2, 6), seed=0, eos_token_id=None, batch_size=2))


def test_only_the_prompt_whose_values_are_broken_is_named():
    """Its table has a nan at a token that the other prompts' top candidates do not hold."""
    reference = causal_lm("llama_grouped_tied")
    plain = ReferencePolicy(reference, top_k=6)
    candidates = [set(s.token_ids.tolist()) for s in plain.prefill(PROMPTS)]
    token = next(iter(candidates[2] - candidates[0] - candidates[1]))
    table = torch.zeros(VOCAB)
    table[token] = math.nan
    policy = TokenTablePolicy(reference, {"even": table}, {"even": 1.0}, beta=1.0, top_k=6)
    with pytest.raises(DataError, match=re.escape("prompt 42: the values of even are not finite")):
        decode(policy, PROMPTS, **OPTIONS | {"max_new_tokens": 1, "batch_size": 3})


def test_a_reference_without_finite_probabilities_is_named_as_such():
    reference = causal_lm("llama_grouped_tied")
    with torch.no_grad():
        reference.lm_head.weight.fill_(math.nan)
    with pytest.raises(DataError, match="prompt 40: the reference's probabilities are not finite"):
        decode(ReferencePolicy(reference, top_k=6), PROMPTS, **OPTIONS)


def test_looking_for_what_is_not_finite_costs_no_look_of_its_own(monkeypatch):
    """The host reads the device as often as the loop looked before: once every `sync_every` steps, and at the ends."""
    from collections import deque

    from utils import decoding

    policy = MavisPolicy(causal_lm("llama_grouped_tied"), [value_model("llama_grouped_tied")], [1.0], beta=1.0, top_k=6)
    reads = {"step": 0, "look": 0}
    real, inside = torch.Tensor.tolist, []
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: (reads.__setitem__("look", reads["look"] + 1), real(self))[1]
    )
    for name in ("__bool__", "item", "__float__", "__int__"):
        method = getattr(torch.Tensor, name)

        def counted(self, *args, method=method):
            if inside:
                reads["step"] += 1
            return method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    distribution, record = policy.distribution, decoding._Rows.record

    def watched(function):
        def wrapper(*args):
            inside.append(1)
            try:
                return function(*args)
            finally:
                inside.pop()

        return wrapper

    monkeypatch.setattr(policy, "distribution", watched(distribution))
    monkeypatch.setattr(decoding._Rows, "record", watched(record))
    queue = deque([decoding.Job((1,), decoding.Prefix([5, 6]), 32)])
    list(decoding.run_jobs(policy, queue, eos_token_id=None, batch_size=1, sync_every=16))
    assert reads["step"] == 0  # neither the distribution nor the record of a step waits for the device
    assert reads["look"] == 2 + 2  # two looks in 32 steps, and the two pieces of the completion
