"""The loading code of configs/paper_7b.yaml on small random models of the published architectures and tokenizers."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import baseline_eval
import dataset_preprocess
import get_data_base
import label_tree
import mavis
import split_data
import train_value_model
from tests import paper_models_for_tests as paper
from utils import models, rewards, value_models
from utils.adapters import merge_adapter
from utils.cli import run
from utils.config import REPOSITORY, load_config
from utils.decoding import decode
from utils.errors import DataError
from utils.policies import MavisPolicy
from utils.text_formats import FORMATS
from utils.value_models import load_value_model, vocabulary_hash

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")

PROMPTS = {
    "anthropic": [
        "\n\nHuman: How do I bake bread?\n\nAssistant: ",
        "\n\nHuman: Is it RUDE to ask my neighbour about the dog? It barks, and barks; what now\n\nAssistant: ",
        "\n\nHuman: water\n\nAssistant: ",
    ],
    "summary": [
        FORMATS["instruction"].wrap_user("my neighbour's dog barks at night and nobody knows why it does"),
        FORMATS["instruction"].wrap_user("I mix flour and water.\nThen I wait."),
        FORMATS["instruction"].wrap_user("bread"),
    ],
}
RESPONSES = ["Mix flour, water and salt.", "", "Ask them. Or do not </s> ask", "the dog " * 9, "x"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The small models, the configuration that points to them, and the merged reference of each data set."""
    folder = tmp_path_factory.mktemp("paper")
    config = load_config(paper.save_all(folder), folder / "ws")
    base, tokenizer = models.load_base(config, CPU)
    from peft import LoraConfig, get_peft_model

    for dataset in config.datasets.values():  # what sft.py and merge_sft_lora.py leave
        lora = dataset.sft.lora
        torch.manual_seed(7)
        adapted = get_peft_model(
            models.load_base(config, CPU)[0],
            LoraConfig(
                task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.target_modules),
                init_lora_weights=False,
            ),
        )  # fmt: skip
        adapted.save_pretrained(folder / "lora", save_embedding_layers=False)
        merged = merge_adapter(models.load_base(config, CPU)[0], folder / "lora")
        merged.save_pretrained(folder / "ws" / "sft_model" / dataset.name)
        tokenizer.save_pretrained(folder / "ws" / "sft_model" / dataset.name)
    return SimpleNamespace(config=config, folder=folder, base=base, tokenizer=tokenizer)


def test_only_paths_differ_from_the_published_configuration(world):
    published = REPOSITORY / "configs/paper_7b.yaml"
    assert paper.without_paths(paper.plain(world.config.path)) == paper.without_paths(paper.plain(published))


def test_the_base_gets_a_padding_token_and_keeps_what_it_had(world):
    plain = models.load_causal_lm(world.config.base_model.path, CPU)
    size = plain.config.vocab_size
    tokenizer = world.tokenizer
    assert len(tokenizer) == size + 1 == models.vocabulary_size(world.base) == world.base.config.vocab_size
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    assert special == world.config.base_model.special_tokens
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == size == world.base.config.pad_token_id
    assert world.base.lm_head.weight.shape[0] == size + 1
    ids = tokenizer(PROMPTS["anthropic"][0], return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1 and ids[0, -1] != 2
    with torch.no_grad():
        torch.testing.assert_close(world.base(ids).logits[..., :size], plain(ids).logits)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_merged_reference_has_the_resized_vocabulary(world, name):
    model, tokenizer = models.load_reference(world.config, world.config.dataset(name), CPU)
    assert len(tokenizer) == models.vocabulary_size(model) == len(world.tokenizer)
    assert tokenizer.pad_token == "[PAD]" and tokenizer.get_vocab() == world.tokenizer.get_vocab()
    assert not model.training
    batch = tokenizer(PROMPTS[name], padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():  # padding changes nothing
        padded = model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits[:, -1]
        for prompt, row in zip(PROMPTS[name], padded, strict=True):
            alone = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


def new_value_model(world, **options):
    return value_models.new_value_model(world.config, world.tokenizer, len(world.tokenizer), CPU, **options)


def values_of(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


def test_a_value_model_is_trained_saved_and_loaded_to_the_same_values(world, tmp_path):
    model = new_value_model(world)
    spec = world.config.value_model.lora
    assert (spec.r, spec.alpha, spec.dropout) == (128, 256, 0.2)
    assert models.vocabulary_size(model) == len(world.tokenizer)  # one more than TinyLlama's own
    assert model.config.pad_token_id == world.tokenizer.pad_token_id and model.config.num_labels == 1
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora", name).groups() for name in trained if "lora_" in name}
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert layers == {(str(i), module) for i in range(2) for module in modules}
    assert [name for name in trained if "lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]

    texts = [p + r for p in PROMPTS["anthropic"] for r in RESPONSES]
    assert values_of(model, world.tokenizer, texts).abs().max() == 0  # the head starts at zero
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = world.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    target = torch.linspace(-1, 1, len(texts))
    losses = []
    for _ in range(8):
        loss = (model.train()(**batch).logits[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "help", save_embedding_layers=False)

    loaded = load_value_model(world.config, tmp_path / "help", world.tokenizer, len(world.tokenizer), CPU)
    expected = values_of(model, world.tokenizer, texts)
    torch.testing.assert_close(values_of(loaded, world.tokenizer, texts), expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.1
    continued = new_value_model(world, init_checkpoint=tmp_path / "help")
    torch.testing.assert_close(values_of(continued, world.tokenizer, texts), expected, atol=1e-6, rtol=1e-5)
    assert {name for name, p in continued.named_parameters() if p.requires_grad} == trained


# ------------------------------------------------------------------------------------------------------------ rewards


def one_at_a_time(name, path, prompt, response):
    """The reward of one text, by the published rule of its reward model, with transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    post = prompt.removeprefix("### Instruction: Generate a one-sentence summary of this post. ### Input: ")
    post = post.removesuffix(" ### Response: ")
    text, label, longest = {
        "help": (prompt + response, 0, 512),
        "harm": (prompt + response, 0, 512),
        "humor": (prompt + response, 1, 512),
        "summarization": (response + " " + str(tokenizer.bos_token) + " " + post, 0, 1024),
        "faithful": (response + " </s></s> " + post, 1, 1024),
    }[name]
    inputs = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        return float(model(**inputs).logits[0, label])


@pytest.mark.parametrize("name", PROMPTS)
def test_rewards_equal_the_published_rule_one_text_at_a_time(world, name):
    """Texts of different lengths in one batch, an empty answer, an answer with an end token, one over the limit."""
    spec = world.config.dataset(name)
    answers = [*RESPONSES, "salt and yeast " * 150]
    prompts = [PROMPTS[name][i % 3] for i in range(len(answers))]
    got = rewards.RewardSet(world.config, spec, spec.objectives, "cpu", batch_size=4).score(prompts, answers)
    assert list(got) == list(spec.objectives)
    for objective, values in got.items():
        path = world.config.objective(objective).path
        expected = [one_at_a_time(objective, path, p, r) for p, r in zip(prompts, answers, strict=True)]
        np.testing.assert_allclose(values, expected, atol=2e-5, err_msg=objective)
        assert np.std(expected) > 1e-3


# ----------------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("name", PROMPTS)
def test_every_stage_runs_with_the_published_configuration(world, name, tmp_path, monkeypatch, capsys):
    """From rows to a steered run, at the published settings but for the numbers of prompts, tokens and steps."""
    monkeypatch.delenv("DATA_DIR", raising=False)
    config, spec = world.config, world.config.dataset(name)
    rows = tmp_path / "rows.jsonl"
    ask = "my neighbour's dog barks at night, and I do not know how to ask them for silence, or if I should; number {}"
    made = [ask.format(i) for i in range(5)]
    if name == "anthropic":
        records = [{"chosen": f"\n\nHuman: {text}\n\nAssistant: Ask them.", "rejected": ""} for text in made]
    else:
        records = [{"info": {"post": text}, "summaries": [{"text": "a dog"}], "choice": 0} for text in made]
    rows.write_text("".join(json.dumps(r) + "\n" for r in records))
    common = ["--config", str(config.path), "--workspace", str(config.workspace), "--device", "cpu"]

    def stage(script, *arguments):
        assert run(lambda: script.main([*map(str, arguments), *common])) == 0, capsys.readouterr().err

    for split in ("train", "test"):
        stage(dataset_preprocess, name, f"--split={split}", "--data_files", rows)
    data = ("--dataset", name)
    trees, training = config.default_path("tree_data", name, "iter_0"), tmp_path / "training"
    stage(get_data_base, 0, 5, *data, "--max_new_tokens", 10, "--num_layers", 3)
    stage(label_tree, trees, "all", *data)
    stage(label_tree, trees, "all", *data, "--check_trees")
    with monkeypatch.context() as patch:  # where all has values, no reward model is loaded
        patch.setattr(rewards, "RewardSet", None)
        stage(label_tree, trees, "all", *data)
    stage(split_data, trees, *data, "--num_val", 2, "--output_dir", training)
    for objective in spec.objectives[:2]:
        stage(train_value_model, *data, "--objective", objective, "--data_dir", training, "--batch_size", 24)
    adapter = json.loads(
        (config.workspace / "value_models/iter_0" / spec.objectives[0] / "adapter_config.json").read_text()
    )
    assert (adapter["r"], adapter["lora_alpha"], adapter["task_type"]) == (128, 256, "SEQ_CLS")
    small = ("--num_prompts", 3, "--num_trials", 1, "--max_new_tokens", 6)
    stage(mavis, *data, "--obj_weights", "0.4,0.6", "--beta", 4, *small)
    stage(baseline_eval, *data, *small)
    stage(baseline_eval, *data, *small, "--num_samples", 2, "--obj_weights", "0.4,0.6")
    capsys.readouterr()
    stage(mavis, *data, "--obj_weights", "1", "--beta", 4, "--max_new_tokens", 6, "--prompt", ask.format("x"))
    said = capsys.readouterr().out
    assert all(re.search(rf"{objective} -?\d+\.\d+", said) for objective in spec.objectives)


def test_steering_reads_any_number_of_prompts_with_grouped_value_models(world):
    """Decoding with the reference (full attention) and two value models (grouped), with keys of their own."""
    spec = world.config.dataset("anthropic")
    reference, tokenizer = models.load_reference(world.config, spec, CPU, dtype=torch.float64)
    torch.manual_seed(3)
    value_models = {}
    for objective in ("help", "humor"):
        model = new_value_model(world)
        torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
        value_models[objective] = model.double()
    policy = MavisPolicy(reference, value_models, {"help": 0.2, "humor": 0.8}, beta=4.0)
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS["anthropic"]]
    keys = [(0, i, 0) for i in range(len(prompts))]
    options = dict(max_new_tokens=8, eos_token_id=tokenizer.eos_token_id)
    together = decode(policy, prompts, keys=keys, batch_size=3, **options)
    alone = [decode(policy, [p], keys=[k], batch_size=1, **options)[0] for p, k in zip(prompts, keys, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert all(np.isfinite(c.log_ratio) for c in together)


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_a_value_models_base_with_another_vocabulary_is_refused(world, tmp_path):
    paper.save_llama(tmp_path / "other", paper.llama_tokenizer(extra="<other>"), kv_heads=2)
    data = paper.plain(world.config.path)
    data["value_model"]["path"] = str(tmp_path / "other")
    file = tmp_path / "other.yaml"
    file.write_text(json.dumps(data))
    config = load_config(file, world.config.workspace)
    with pytest.raises(DataError, match=r"other has another vocabulary than the reference .* tokens differ \(id 3 is"):
        value_models.new_value_model(config, world.tokenizer, len(world.tokenizer), CPU)


def test_a_value_model_trained_for_another_vocabulary_is_refused(world, tmp_path):
    new_value_model(world).save_pretrained(tmp_path / "help", save_embedding_layers=False)
    load = lambda: load_value_model(world.config, tmp_path / "help", world.tokenizer, len(world.tokenizer), CPU)  # noqa: E731
    load()  # an adapter without a record of ours is taken as it is
    known = {"size": len(world.tokenizer), "hash": vocabulary_hash(world.tokenizer)}
    (tmp_path / "help" / "metrics.json").write_text(json.dumps({"vocabulary": known}))
    load()
    (tmp_path / "help" / "metrics.json").write_text(json.dumps({"vocabulary": {"size": 99, "hash": "0"}}))
    with pytest.raises(DataError, match=r"trained for another vocabulary \(99 tokens\) than that of the reference"):
        load()


def test_a_tokenizer_with_more_tokens_than_its_model_is_refused(world, tmp_path):
    shutil.copytree(world.config.base_model.path, tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")  # with [PAD], for which the model has no embedding
    with pytest.raises(DataError, match=r"has \d+ tokens, the model \d+; it was saved with another model"):
        models.load_reference(world.config, world.config.dataset("summary"), CPU, path=str(tmp_path / "model"))


def test_weights_that_a_checkpoint_lacks_are_refused_and_not_drawn(world, tmp_path):
    """A reward from a language model, or a reference from a classifier, would be noise that differs from run to run."""
    base = world.config.base_model.path
    with pytest.raises(DataError, match=r"lacks 1 weights of a \w+ForSequenceClassification \(first score.weight\)"):
        models.load_sequence_classifier(base, CPU)
    model, tokenizer = models.new_sequence_classifier(base, CPU)  # whose head is to be new
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "classifier")
    assert models.load_sequence_classifier(str(tmp_path / "classifier"), CPU)[0].config.num_labels == 1
    with pytest.raises(DataError, match=r"lacks 1 weights of a \w+ForCausalLM \(first lm_head.weight\)"):
        models.load_causal_lm(str(tmp_path / "classifier"), CPU, what="reference model")
    small = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    pooled = transformers.BertForSequenceClassification(transformers.BertConfig(**small, intermediate_size=8))
    kept = {k: v.clone() for k, v in pooled.state_dict().items() if "pooler" not in k}
    pooled.save_pretrained(tmp_path / "pooled", state_dict=kept)
    tokenizer.save_pretrained(tmp_path / "pooled")
    with pytest.raises(DataError, match="lacks 2 weights of a BertForSequenceClassification"):
        models.load_sequence_classifier(str(tmp_path / "pooled"), CPU)
    encoder, _ = models.load_encoder(str(tmp_path / "pooled"), CPU)  # whose pooler nothing reads
    assert torch.equal(encoder.embeddings.word_embeddings.weight, pooled.bert.embeddings.word_embeddings.weight)
    trunk = models.load_trunk(str(tmp_path / "classifier"), 1, CPU)
    assert torch.equal(trunk.embed_tokens.weight, model.model.embed_tokens.weight)


def test_biases_in_the_place_of_positions_are_refused_wherever_rows_are_read(world, tmp_path):
    shape = transformers.MptConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=len(world.tokenizer))
    transformers.MptForCausalLM(shape).save_pretrained(tmp_path / "mpt")
    with pytest.raises(DataError, match="ALiBi"):
        models.load_trunk(str(tmp_path / "mpt"), None, CPU)
    spec = dataclasses.replace(world.config.value_model, path=str(tmp_path / "mpt"), num_layers=None)
    with pytest.raises(DataError, match="ALiBi"):
        config = dataclasses.replace(world.config, value_model=spec)
        value_models.new_value_model(config, world.tokenizer, len(world.tokenizer), CPU)


def test_an_adapter_on_modules_that_a_model_lacks_names_those_that_it_has(world):
    lora = dataclasses.replace(world.config.value_model.lora, target_modules=("query_key_value", "dense"))
    spec = dataclasses.replace(world.config.value_model, lora=lora)
    config = dataclasses.replace(world.config, value_model=spec)
    with pytest.raises(DataError, match="query_key_value, dense: .* has none of these.*down_proj, gate_proj, k_proj"):
        value_models.new_value_model(config, world.tokenizer, len(world.tokenizer), CPU)


def test_pickled_weights_are_refused(world, tmp_path):
    objective = world.config.objective("help")
    shutil.copytree(objective.path, tmp_path / "model")
    model, _ = models.load_sequence_classifier(str(tmp_path / "model"), CPU)
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no usable checkpoint .* no file named model.safetensors"):
        models.load_sequence_classifier(str(tmp_path / "model"), CPU)


# ----------------------------------------------------------------------------------------------------------- dry runs

STAGES = {
    "dataset_preprocess.py anthropic --split=train": ["Hub: Anthropic/hh-rlhf train", "meta-llama/Llama-2-7b-hf"],
    "dataset_preprocess.py summary --split=test": ["openai/summarize_from_feedback comparisons validation"],
    "Finetuning/SFT/sft.py --exp_type assistant": ["Llama-2-7b-hf", "Anthropic/hh-rlhf", "sft_lora/anthropic"],
    "Finetuning/SFT/merge_sft_lora.py --exp_type summary": ["Llama-2-7b-hf", "sft_lora/summary", "SFT/sft.py"],
    "get_data_base.py 0 5000 --dataset anthropic": ["sft_model/anthropic", "SFT/sft.py", "tree_data/anthropic/iter_0"],
    "get_data_iter.py 0 10 help --dataset anthropic --beta 4": ["value_models/iter_0/help", "train_value_model.py"],
    "label_tree.py trees all --dataset anthropic": ["Ray2333/gpt2-large-helpful-reward_model", "humor-no-humor"],
    "label_tree.py trees all --dataset summary": ["Tristan/gpt2_reward_summarization", "CogComp/bart-faithful-summary"],
    "split_data.py trees --dataset summary": ["data_for_training/summary/trees"],
    "train_value_model.py --dataset summary --objective faithful": ["TinyLlama/TinyLlama_v1.1", "iter_0/faithful"],
    "fit_token_table.py trees all": ["token_tables/humor.safetensors"],
    "mavis.py --dataset anthropic --obj_weights 0.2,,0.8 --value_model_iter 1,,0 --beta 4": [
        "sft_model/anthropic", "value_models/iter_1/help", "value_models/iter_0/humor", "humor-no-humor",
    ],
    "mavis_bs.py --dataset summary --obj_weights 0.5,0.5 --beta 4 --Q 4": ["iter_0/summarization", "iter_0/faithful"],
    "baseline_eval.py --dataset summary --num_samples 4 --obj_weights 1": ["sft_model/summary", "baseline_bon_logs"],
    "baseline_eval.py --dataset anthropic --token_table --beta 4 --obj_weights 1": ["token_tables/help.safetensors"],
}  # fmt: skip


def test_a_dry_run_of_every_stage_needs_no_model_no_network_and_no_torch(tmp_path):
    """All in one fresh interpreter whose sockets are taken away; nothing is written anywhere."""
    program = f"""
import importlib.util, shlex, socket, sys
def refused(*arguments, **keywords):
    raise AssertionError("a dry run opened a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
sys.path.insert(0, {str(REPOSITORY)!r})
from utils.cli import run
for command in {list(STAGES)!r}:
    script, *words = shlex.split(command)
    spec = importlib.util.spec_from_file_location("script", {str(REPOSITORY)!r} + "/" + script)
    module = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print("##", command)
    status = run(lambda: module.main([*words, "--dry_run", "--config", "paper_7b", "--workspace", "ws"]))
    assert status == 0, (command, status)
    heavy = [name for name in ("torch", "transformers", "datasets", "h5py") if name in sys.modules]
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split("## ")[1:]
    for (command, expected), text in zip(STAGES.items(), printed, strict=True):
        assert text.startswith(command) and re.search(r"^what +path +found$", text, re.M), text
        for part in expected:
            assert part in text, f"{command} does not say {part}:\n{text}"
        for line in text.splitlines()[2:]:
            assert re.search(r"  (Hub|here|missing|Python|made|this command|would|not yet)", line), line
    assert not any(tmp_path.iterdir()) and not done.stderr
