"""A world of tiny random models, made in a second: a reference, two value models, prompts, functions as rewards."""

import importlib

import yaml

from utils.runs import read_samples

WORDS = [f"w{i}" for i in range(40)]
REWARDS = """
def low(prompts, responses):
    return [sum(int(w[1:]) < 20 for w in r.split()) / max(1, len(r.split())) for r in responses]

def even(prompts, responses):
    return [sum(int(w[1:]) % 2 == 0 for w in r.split()) / max(1, len(r.split())) for r in responses]

def length(prompts, responses):
    assert all(not p.startswith("Human") for p in prompts)
    return [len(r.split()) for r in responses]
"""
CONFIG = {
    "label": "toy",
    "workspace": "workspace",
    "cpu_dtype": "float64",
    "base_model": {"path": "base_model", "made_by": "make base"},
    "value_model": {"path": "base_model", "num_layers": 1, "lora": {"r": 2, "alpha": 4}},
    "decoding": {"top_k": 6, "batch_size": 3},
    "evaluation": {"num_prompts": 4, "num_trials": 2, "seed": 0},
    "datasets": {
        "toy": {
            "exp_type": "toy",
            "prompt_format": "dialogue",
            "reference_template": "{user}",
            "sft_model": "base_model",
            "splits": {"test": {"hub": "x/y"}},
            "objectives": ["low", "even", "length"],
            "max_new_tokens": 6,
            "max_prompt_tokens": 20,
        }
    },
    "objectives": {n: {"kind": "callable", "function": f"toy_rewards:{n}"} for n in ("low", "even", "length")},
}


def make_toy(folder):
    """A configuration, toy.yaml, whose workspace has all of it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from utils.config import load_config
    from utils.data import prompts_csv, write_prompts
    from utils.models import load_tokenizer
    from utils.value_models import new_value_model

    (folder / "toy_rewards.py").write_text(REWARDS)
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    workspace = folder / "workspace"
    base = workspace / "base_model"
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<eos>", "<pad>", "<unk>", *WORDS])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(base)
    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS) + 3, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaForCausalLM(
        LlamaConfig(
            **shape,
            num_attention_heads=2,
            max_position_embeddings=40,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=1,
        )
    ).save_pretrained(base)
    config = load_config(folder / "toy.yaml", workspace)
    spec = config.dataset("toy")
    write_prompts(prompts_csv(config, spec, "test"), [f"\n\nHuman: w{i} w{i + 1}\n\nAssistant: " for i in range(5)])
    tokenizer = load_tokenizer(base)
    for seed, name in enumerate(("low", "even")):
        model = new_value_model(config, tokenizer, len(WORDS) + 3, torch.device("cpu"), seed=seed)
        torch.nn.init.normal_(
            model.get_base_model().score.modules_to_save["default"].weight,
            generator=torch.Generator().manual_seed(seed),
        )
        model.save_pretrained(workspace / "value_models" / "iter_0" / name)


class Script:
    """Calls a script's main in a workspace."""

    def __init__(self, toy, workspace):
        self.toy, self.workspace = toy, workspace

    def __call__(self, name, *argv):
        common = [
            "--config",
            self.toy / "toy.yaml",
            "--workspace",
            self.workspace,
            "--dataset",
            "toy",
            "--device",
            "cpu",
        ]
        return importlib.import_module(name).main([*map(str, argv), *map(str, common)])


def status(script, name, *argv):
    """The exit status that the script's process would have."""
    from utils.cli import run

    try:
        return run(lambda: script(name, *argv))
    except SystemExit as stopped:  # argparse
        return stopped.code


def run_folders(script):
    return sorted(f.parent for f in script.workspace.glob("*/*/*/*/args.yaml"))


def answers(folder):
    kept = ("index", "trial", "response", "rewards", "tokens", "finished", "log_ratio", "num_candidates", "distinct")
    rows = [{k: s[k] for k in kept} for s in read_samples(folder)]
    for row in rows:
        row["log_ratio"] = round(row["log_ratio"], 9)
    return sorted(rows, key=lambda s: (s["index"], s["trial"]))
