"""What texts have in common is read once, and every text gets what it gets when it is read alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.test_rewards import bpe, save_distilbert, save_gpt2, spread, write_config
from utils.batching import length_batches
from utils.config import load_config
from utils.pooled_reward import pooled_features
from utils.prefix_tree import ARCHITECTURES, SHARE, classifies_rows, pack, read_rows, tree_mask
from utils.rewards import RewardSet

VOCABULARY = 50
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
READ = {"batch_size": 3, "token_budget": 400, "row_tokens": 300}


def classifier(kind: str, **settings):
    """A tiny classifier with three random logits; its padding token is 1."""
    sizes = GPT2_SIZES if kind == "gpt2" else SIZES
    sizes = sizes | {"vocab_size": VOCABULARY, "pad_token_id": 1, "num_labels": 3} | settings
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    return spread(model)


def random_tree(generator, children=(3, 2, 2), prompt=12, segment=(1, 9)) -> list[list[int]]:
    """The leaves' texts of a random tree, in its order."""
    texts = [generator.integers(2, VOCABULARY, prompt).tolist()]
    for width in children:
        texts = [
            text + generator.integers(2, VOCABULARY, generator.integers(*segment)).tolist()
            for text in texts
            for _ in range(width)
        ]
    return texts


def odd_texts(seed: int = 0) -> list[list[int]]:
    """Leaves of two trees and what is odd: beginnings of others, equals, one token, nothing in common, the longest."""
    generator = np.random.default_rng(seed)
    texts = random_tree(generator) + random_tree(generator)
    texts += [texts[0][:20], texts[0][:13], texts[5], texts[5], [7], [7], [texts[0][0]]]
    texts += [generator.integers(2, VOCABULARY, n).tolist() for n in (2, 30, 64)]
    return [texts[i] for i in generator.permutation(len(texts))]


def prefixes(texts) -> set[tuple[int, ...]]:
    """The nodes of the texts' trie."""
    return {tuple(text[: n + 1]) for text in texts for n in range(len(text))}


def count_tokens(module) -> list[tuple[int, int]]:
    """The sizes (B, L) of what a model is given from now on."""
    sizes: list[tuple[int, int]] = []
    module.get_input_embeddings().register_forward_hook(lambda _, ids, out: sizes.append(tuple(ids[0].shape)))
    return sizes


# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("seed", range(20))
def test_each_text_is_once_in_the_rows_and_sees_itself_alone(seed):
    generator = np.random.default_rng(seed)
    alphabet, longest, limit = (int(generator.integers(low, high)) for low, high in ((1, 4), (1, 25), (0, 80)))
    texts = [generator.integers(0, alphabet, generator.integers(1, longest + 1)).tolist() for _ in range(40)]
    rows = pack(texts, limit)
    assert sorted(i for row in rows for i in row.members) == list(range(40))
    for row in rows:
        size = len(row.tokens)
        assert size == len(row.positions) == len(row.ends)
        assert len(row.members) == 1 or size == len(prefixes([texts[i] for i in row.members])) <= limit
        seen = tree_mask(torch.as_tensor(row.ends[None]))[0, 0] == 0  # (query, key)
        for i, path in zip(row.members, row.paths, strict=True):
            assert row.tokens[path].tolist() == texts[i]
            assert row.positions[path].tolist() == list(range(len(texts[i])))
            for n, place in enumerate(path):
                assert torch.nonzero(seen[place]).flatten().tolist() == path[: n + 1].tolist()


def test_a_trees_leaves_are_one_row_of_its_tokens():
    texts = random_tree(np.random.default_rng(0))
    (row,) = pack(texts, 1000)
    assert len(row.tokens) == len(prefixes(texts)) < sum(map(len, texts)) / 2


def test_what_shares_little_stays_alone():
    start, generator = [3, 4, 5], np.random.default_rng(0)
    texts = [start + [6 + i] + generator.integers(2, VOCABULARY, 20).tolist() for i in range(30)]
    assert len(start) < SHARE * len(texts[0])
    assert [len(row.members) for row in pack(texts, 1000)] == [1] * 30


def test_a_limit_of_0_leaves_even_equal_texts_alone():
    assert [len(row.members) for row in pack([[1, 2]] * 3, 0)] == [1, 1, 1]
    assert [len(row.members) for row in pack([[1, 2]] * 3, 2)] == [3]


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="sequence 1 of 2 has no tokens"):
        pack([[1], []])


def test_batches_hold_texts_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 500, 100)
    batches = list(length_batches(lengths, 16, 4000, fullness=0.75))
    assert sorted(np.concatenate(batches)) == list(range(100))
    assert all(lengths[b].min() >= 0.75 * lengths[b].max() for b in batches)
    assert max(map(len, batches)) > 1


# --------------------------------------------------------------------------------------------------------- classifiers


def alone(model, texts) -> np.ndarray:
    """(N, labels) logits: the library's own, of one text at a time."""
    with torch.no_grad():
        return np.concatenate([model(input_ids=torch.tensor([text])).logits.double().numpy() for text in texts])


def in_rows(model, texts) -> np.ndarray:
    out = np.zeros((len(texts), model.config.num_labels))
    with torch.no_grad():
        for rows, hidden in read_rows(model.base_model, texts, 0, **READ):
            for row, states in zip(rows, hidden, strict=True):
                out[row.members] = model.score(states[[int(path[-1]) for path in row.paths]]).double().numpy()
    return out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_architecture_reads_rows_as_it_reads_a_text_alone(kind, attention):
    """Rows are longer than the 64 positions that the models have."""
    model, texts = classifier(kind, attn_implementation=attention), odd_texts()
    assert classifies_rows(model, 64) and model.config._attn_implementation == attention
    expected = alone(model, texts)
    sizes = count_tokens(model)
    got = in_rows(model, texts)
    assert max(length for _, length in sizes) > 64 and np.diff(expected, axis=0).std() > 0.01
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind, settings", [
    ("bloom", {"n_layer": 1, "n_head": 4}),  # distances as biases
    ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}),
    ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
              "encoder_attention_heads": 2, "decoder_attention_heads": 2}),
    ("bert", {}),
    ("distilbert", {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2}),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # places counted from the mask
    ("mistral", {"sliding_window": 63}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
])  # fmt: skip
def test_other_architectures_read_each_text_alone(kind, settings):
    assert not classifies_rows(classifier(kind, **settings), 64)


def test_a_window_that_no_text_passes_is_none():
    model = classifier("mistral", sliding_window=64)
    assert classifies_rows(model, 64) and not classifies_rows(model, 65)
    texts = odd_texts()
    np.testing.assert_allclose(in_rows(model, texts), alone(model, texts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("texts", ["odd", "long"])
def test_texts_beyond_a_window_are_read_alone_under_the_models_own_masks(texts):
    """Of a headless model, whose states pooled heads average: as transformers reads one text at a time."""
    backbone = classifier("mistral", sliding_window=8).model
    sequences = odd_texts() if texts == "odd" else [list(range(3, 9)), list(range(3, 13))]
    assert max(map(len, sequences)) > 8
    seen = 0
    for rows, hidden in read_rows(backbone, sequences, 0, batch_size=4, token_budget=400, row_tokens=100):
        for row, states in zip(rows, hidden, strict=True):
            for i, path in zip(row.members, row.paths, strict=True):
                alone = backbone(torch.tensor([sequences[i]])).last_hidden_state[0]
                torch.testing.assert_close(states[path], alone, rtol=1e-4, atol=1e-5)
                seen += 1
    assert seen == len(sequences)


def classifier_rewards(folder: Path, text: str = "{prompt}{response}", **options) -> RewardSet:
    entry = {"kind": "classifier", "path": "model", "text": text}
    config = load_config(write_config(folder, {"help": entry | options.pop("entry", {})}))
    return RewardSet(config, config.dataset("talk"), ["help"], device="cpu", **options)


def save_llama(folder: Path) -> None:
    tokenizer = bpe(["<pad>", "<s>", "</s>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 512}, vocab_size=len(tokenizer), pad_token_id=0,
                         bos_token_id=1, eos_token_id=2, num_labels=1)  # fmt: skip
    spread(LlamaForSequenceClassification(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PROMPTS = ["\n\nHuman: what is it?\n\nAssistant: ", "\n\nHuman: why?\n\nAssistant: ", ""]
BEGUN = "the cold day is now here and we see {it} there, "
ANSWERS = ["", BEGUN, BEGUN, BEGUN + "ok", BEGUN + "ok" * 9, BEGUN + "a kind word", BEGUN * 30, "x", "mean and vague"]


@pytest.mark.parametrize("save, end, pad", [(save_gpt2, "<|endoftext|>", None), (save_llama, "</s>", 0)])
def test_a_decoders_rewards_are_those_of_each_text_alone(save, end, pad, tmp_path):
    """End tokens within a text and at its end count also where they are the padding token (GPT-2)."""
    save(tmp_path / "model")
    rewards = classifier_rewards(tmp_path, batch_size=4, entry={"max_length": 60})
    (scorer,) = rewards._scorers
    answers = ANSWERS + [BEGUN + end, BEGUN + end + "ok", BEGUN + end * 2] + (["ok<pad><pad>"] if pad == 0 else [])
    pairs = [(prompt, answer) for prompt in PROMPTS for answer in answers]
    sizes = count_tokens(scorer.model)
    got = rewards.score(*zip(*pairs, strict=True))["help"]
    assert sum(b * n for b, n in sizes) < 1000 and scorer.row_tokens > 0
    scorer.model.config.pad_token_id = pad
    ids = [scorer.tokenizer(p + a, truncation=True, max_length=60)["input_ids"] or [1 if pad == 0 else 0]
           for p, a in pairs]  # fmt: skip
    assert max(map(len, ids)) == 60 and sum(map(len, ids)) > 1200
    expected = alone(scorer.model, ids)[:, 0]
    assert np.unique(expected.round(4)).size > 20
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_shared_rows_and_lonely_ones_give_the_same_rewards(tmp_path):
    save_gpt2(tmp_path / "model")
    prompts, answers = zip(*[(p, a) for p in PROMPTS for a in ANSWERS], strict=True)
    shared, lonely, rough = (
        classifier_rewards(tmp_path, **options).score(prompts, answers)["help"]
        for options in ({}, {"row_tokens": 0}, {"autocast": True})
    )
    np.testing.assert_allclose(shared, lonely, rtol=1e-5, atol=1e-5)
    assert 0 < np.abs(rough - shared).max() < 0.1 * shared.std() + 0.05


def test_an_encoder_is_given_whole_texts(tmp_path):
    save_distilbert(tmp_path / "model")
    rewards = classifier_rewards(tmp_path)
    (scorer,) = rewards._scorers
    sizes = count_tokens(scorer.model)
    rewards.score([PROMPTS[0]] * 5, [BEGUN] * 5)
    assert scorer.row_tokens == 0
    assert sizes == [(5, len(scorer.tokenizer(PROMPTS[0] + BEGUN)["input_ids"]))]


# -------------------------------------------------------------------------------------------------------------- pooled


@pytest.fixture(scope="module")
def trunk():
    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, pad_token_id=1)
    return spread(AutoModel.from_config(config, dtype=torch.float32))


def mean_state(trunk, text: list[int], start: int) -> np.ndarray:
    """The mean of the response's normalised states, of one text alone."""
    with torch.no_grad():
        hidden = trunk(input_ids=torch.tensor([text])).last_hidden_state[0, start:]
    return (hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt()).mean(0).numpy()


def test_features_are_those_of_each_text_alone(trunk):
    """Texts of one trie whose responses start at different tokens, and responses without tokens."""
    generator, texts = np.random.default_rng(1), odd_texts(1)
    encoded = [(text, int(generator.integers(0, len(text) + 1))) for text in texts]
    encoded += [(texts[0], len(texts[0])), ([], 0), (texts[1], 0)]
    features = pooled_features(trunk, encoded, 1, **READ)
    empty = [len(text) == start for text, start in encoded]
    assert sum(empty) >= 2 and not features[empty].any()
    for feature, (text, start) in zip(features, encoded, strict=True):
        if len(text) > start:
            np.testing.assert_allclose(feature, mean_state(trunk, text, start), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("read", ["pooled", "classifier"])
def test_a_trees_tokens_are_read_once(trunk, read):
    texts = random_tree(np.random.default_rng(2))
    nodes = len(prefixes(texts))
    model = trunk if read == "pooled" else classifier("llama")
    sizes = count_tokens(model)
    if read == "pooled":
        pooled_features(trunk, [(text, 12) for text in texts], 1)
    else:
        in_rows(model, texts)
    assert sizes == [(1, nodes)]


def test_answers_to_a_long_conversation_share_it(trunk):
    """A conversation may be longer than the rows of short texts; a batch keeps to its budget all the same."""
    conversation = np.random.default_rng(5).integers(2, VOCABULARY, 40).tolist()
    encoded = [(conversation + [2 + i] * 10, 40) for i in range(6)]
    sizes = count_tokens(trunk)
    pooled_features(trunk, encoded, 1, row_tokens=30)
    assert sizes == [(1, 100)]
    pooled_features(trunk, encoded, 1, row_tokens=30, token_budget=70)
    assert sizes[1:] == [(1, 70)] * 2


def test_responses_without_tokens_are_not_read(trunk):
    sizes = count_tokens(trunk)
    assert not pooled_features(trunk, [([2, 3, 4], 3), ([], 0)], 1).any() and not sizes
    assert pooled_features(trunk, [], 1).shape == (0, 32)


def test_padding_changes_nothing(trunk):
    """Rows of different lengths share a batch; what stands behind the shorter ones is seen by none of its tokens."""
    texts = random_tree(np.random.default_rng(3))
    others = random_tree(np.random.default_rng(4))[:-1]
    encoded, sizes = [(text, 12) for text in texts + others], count_tokens(trunk)
    features = [pooled_features(trunk, encoded, pad_id) for pad_id in (0, 9)]
    assert sizes == [(2, max(len(prefixes(texts)), len(prefixes(others))))] * 2
    assert len(prefixes(texts)) != len(prefixes(others))
    np.testing.assert_array_equal(*features)


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_measures_both_ways_on_real_trees(rival_world, tmp_path):
    import get_data_base
    from benchmarks import labelling

    collect = ["0", "6", "--dataset", "anthropic", "--output_dir", str(tmp_path / "trees"), *rival_world.common]
    assert get_data_base.main(collect) == 0
    options = ["--data_dir", str(tmp_path / "trees"), "--layers", "1", "--rounds", "1", *rival_world.common]
    assert labelling.main([*options, "--output", str(tmp_path / "labelling.json")]) == 0
    leaves, firsts = json.loads((tmp_path / "labelling.json").read_text())["rows"]
    assert (leaves["reward"], leaves["texts"]) == ("classifier", "leaves")
    assert leaves["tokens_shared"] < leaves["tokens_alone"] and leaves["seconds_ratio"] > 0
    assert firsts["tokens_shared"] < leaves["tokens_shared"] and firsts["number"] <= 6
