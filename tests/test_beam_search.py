"""Beam search over values beside a version without caches, batches or reordering."""

import pytest

from tests import brute_force
from tests.models_for_tests import VOCAB, causal_lm, value_model
from tests.test_decoding import EOS, eager_to_end, make_prompts
from utils.decoding import beam_search, decode
from utils.policies import MavisPolicy, ReferencePolicy

NAMES = ("a", "b")


def make_policy(architecture="llama_grouped_tied", pooling="last", **kwargs):
    reference = causal_lm(architecture)
    values = {n: value_model(architecture, i + 1, pooling=pooling) for i, n in enumerate(NAMES)}
    arguments = dict(beta=3.0, top_k=6) | kwargs
    return reference, values, MavisPolicy(reference, values, {"a": 0.4, "b": 0.6}, **arguments)


@pytest.mark.parametrize(("beams", "samples"), [(3, 1), (2, 3), (4, 2), (1, 4)])
@pytest.mark.parametrize(
    ("architecture", "pooling"), [("llama_grouped_tied", "last"), ("gpt2", "last"), ("llama_grouped_tied", "mean")]
)
def test_beam_search_equals_the_slow_version_token_by_token(architecture, pooling, beams, samples):
    reference, values, policy = make_policy(architecture, pooling)
    prompts, keys, eos = make_prompts(3, seed=2), [(5, i) for i in range(3)], 9
    run = dict(num_beams=beams, num_samples=samples, max_new_tokens=7)
    found = beam_search(policy, prompts, keys=keys, num_return=50, eos_token_id=eos, batch_size=2 * beams, **run)
    for prompt, key, completions in zip(prompts, keys, found, strict=True):
        settings = dict(beta=3.0, k=6, temperature=1.0, eos=eos)
        expected = brute_force.beam_search(reference, list(values.values()), [0.4, 0.6], prompt, key, **run, **settings)
        assert [(c.token_ids, c.finished) for c in completions] == [
            (tokens, finished) for tokens, _, finished in expected
        ]
        assert [c.value for c in completions] == pytest.approx([value for _, value, _ in expected], abs=1e-5)


def test_beam_search_without_an_empty_answer_equals_the_slow_version():
    reference, value = eager_to_end("llama_grouped_tied"), value_model("llama_grouped_tied")
    policy = MavisPolicy(reference, [value], [1.0], beta=3.0, top_k=6)
    prompts, keys = make_prompts(6, seed=2), [(5, i) for i in range(6)]
    run = dict(num_beams=3, num_samples=2, max_new_tokens=4)
    searched = {
        held: beam_search(
            policy, prompts, keys=keys, num_return=50, eos_token_id=EOS, batch_size=6, suppress_first_eos=held, **run
        )
        for held in (False, True)
    }
    for prompt, key, completions in zip(prompts, keys, searched[True], strict=True):
        settings = dict(beta=3.0, k=6, temperature=1.0, eos=EOS, suppress_first_eos=True)
        expected = brute_force.beam_search(reference, [value], [1.0], prompt, key, **run, **settings)
        assert [(c.token_ids, c.finished) for c in completions] == [(tokens, end) for tokens, _, end in expected]
    assert any(c.token_ids == [EOS] for found in searched[False] for c in found)
    assert not any(c.token_ids[0] == EOS for found in searched[True] for c in found)


def test_what_is_clipped_for_the_tilt_is_ranked_unclipped():
    """Without normalization v1 clamps values to 6 / beta in the tilt alone; clamped, most beams would tie here."""
    reference, values, policy = make_policy(normalization="none", beta=40.0)
    prompts, keys = make_prompts(6, seed=2), [(5, i) for i in range(6)]
    run = dict(num_beams=3, num_samples=2, max_new_tokens=5)
    found = beam_search(policy, prompts, keys=keys, num_return=50, eos_token_id=9, batch_size=6, **run)
    above = 0
    for prompt, key, completions in zip(prompts, keys, found, strict=True):
        settings = dict(beta=40.0, k=6, temperature=1.0, eos=9, normalization="none")
        expected = brute_force.beam_search(reference, list(values.values()), [0.4, 0.6], prompt, key, **run, **settings)
        assert [c.token_ids for c in completions] == [tokens for tokens, _, _ in expected]
        assert [c.value for c in completions] == pytest.approx([value for _, value, _ in expected], abs=1e-5)
        above += sum(c.value > 6 / 40 for c in completions)
    assert above > 6


@pytest.mark.parametrize("asked", [1, 4])
def test_the_work_of_a_search_is_what_its_beams_read(asked, monkeypatch):
    """Counted at the model: a prompt's beams are read until its last one has ended, whatever is returned of them."""
    policy = MavisPolicy(
        eager_to_end("llama_grouped_tied"), [value_model("llama_grouped_tied")], [1.0], beta=1.0, top_k=6
    )
    reader, read = policy.languages[0], []
    original = type(reader).read

    def counted(self, token_ids, *args):
        if self is reader:
            read.append(token_ids.numel())
        return original(self, token_ids, *args)

    prompts = make_prompts(6, seed=2)
    run = dict(num_beams=4, num_return=asked, max_new_tokens=9, eos_token_id=EOS, suppress_first_eos=True)
    decoded, alone = 0, []
    for i, prompt in enumerate(prompts):
        read.clear()
        monkeypatch.setattr(type(reader), "read", counted)
        [found] = beam_search(policy, [prompt], keys=[(5, i)], **run)
        monkeypatch.setattr(type(reader), "read", original)
        share = sum(c.decoded for c in found)
        assert share == sum(read) - len(prompt) + 4  # the last step's tokens are chosen, and need no reading
        decoded += share - sum(len(c.token_ids) for c in found)
        alone.append([(c.token_ids, c.decoded) for c in found])
    assert decoded > 0
    together = beam_search(policy, prompts, keys=[(5, i) for i in range(6)], batch_size=24, **run)
    assert [[(c.token_ids, c.decoded) for c in found] for found in together] == alone


def test_one_beam_and_one_sample_is_the_plain_decoder():
    _, _, policy = make_policy()
    prompts, keys = make_prompts(5, seed=4), [(5, i) for i in range(5)]
    run = dict(max_new_tokens=10, eos_token_id=[9, 11])
    plain = decode(policy, prompts, keys=keys, batch_size=5, **run)
    searched = beam_search(policy, prompts, keys=keys, num_beams=1, num_return=1, **run)
    for a, [b] in zip(plain, searched, strict=True):
        assert a.token_ids == b.token_ids and a.finished == b.finished
        assert a.log_ratio == pytest.approx(b.log_ratio, abs=1e-9)


def test_more_beams_find_better_values():
    _, _, policy = make_policy()
    prompts = make_prompts(12, seed=6)
    run = dict(keys=[(i,) for i in range(12)], num_return=1, max_new_tokens=8, eos_token_id=None)
    mean = [
        sum(c.value for [c] in beam_search(policy, prompts, num_beams=q, num_samples=2, **run)) / 12 for q in (1, 6)
    ]
    assert mean[1] > mean[0]


def test_the_number_of_returned_texts_is_bounded_by_what_there_is():
    _, _, policy = make_policy()
    [found] = beam_search(policy, [[5, 6]], keys=[(0,)], num_beams=3, num_return=2, max_new_tokens=4, eos_token_id=None)
    assert len(found) == 2 and found[0].value >= found[1].value


@pytest.mark.parametrize("name", ["num_beams", "num_return", "num_samples"])
def test_numbers_below_one_are_refused(name):
    _, _, policy = make_policy()
    arguments = dict(num_beams=2, num_return=1, num_samples=1) | {name: 0}
    with pytest.raises(ValueError, match=name):
        beam_search(policy, [[5]], keys=[(0,)], max_new_tokens=2, eos_token_id=None, **arguments)


def test_a_policy_without_values_cannot_be_searched():
    with pytest.raises(ValueError, match="ReferencePolicy has none"):
        beam_search(
            ReferencePolicy(causal_lm("gpt2")),
            [[VOCAB - 1]],
            keys=[(0,)],
            num_beams=2,
            num_return=1,
            max_new_tokens=2,
            eos_token_id=None,
        )
