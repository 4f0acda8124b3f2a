"""The trained baselines: mixtures beside brute force, soups that are exact averages, trees, evaluation, refusals."""

import importlib
import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests import brute_force
from tests.models_for_tests import causal_lm
from utils import models, rivals
from utils.adapters import load_policies, merge_adapter
from utils.cli import run
from utils.config import REPOSITORY
from utils.decoding import decode
from utils.errors import DataError
from utils.policies import MixturePolicy, RewardGuidedPolicy
from utils.runs import read_arguments, read_samples
from utils.shared_base import AdapterOf

CPU = torch.device("cpu")
NAMES = ("llama_grouped_tied", "gpt2")


def load_script(path):
    name = "rivals_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


merge = load_script("Finetuning/reward_soup_merge.py")


def lora(name, r=4, alpha=8, modules=None, **options):
    modules = modules or (["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "o_proj", "down_proj"])
    return LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=modules, fan_in_fan_out=name == "gpt2", **options
    )


def write_adapter(folder, name, seed, base_seed=0, dtype=torch.float64, **options):
    """A random adapter on a random model of that architecture."""
    model = get_peft_model(causal_lm(name, base_seed, dtype), lora(name, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged(folder, name, base_seed=0):
    """The adapter's full model, its matrices merged by PEFT."""
    return PeftModel.from_pretrained(causal_lm(name, base_seed), str(folder)).merge_and_unload().eval()


# ------------------------------------------------------------------------------------------------------------ mixtures


class Mixture(torch.nn.Module):
    """The mixture as one slow model: what brute force samples from."""

    def __init__(self, members, weights):
        super().__init__()
        self.members, self.weights = members, weights

    def forward(self, **inputs):
        logits = sum(w * m(**inputs).logits for w, m in zip(self.weights, self.members, strict=True))
        return type("Out", (), {"logits": logits})


def assert_like_brute_force(policy, slow, reference, prompts, temperature):
    keys = [(3, i) for i in range(len(prompts))]
    completions = decode(
        policy, prompts, keys=keys, max_new_tokens=8, eos_token_id=2, batch_size=2, trace=True, reference=reference
    )
    for prompt, key, c in zip(prompts, keys, completions, strict=True):
        tokens, _, steps = brute_force.decode(
            slow, [], [], prompt, key, max_new_tokens=8, eos=2, beta=0.0, k=6, temperature=temperature
        )
        assert c.token_ids == tokens
        total = 0.0
        for t, (ours, (ids, p, _, tilted, chosen)) in enumerate(zip(c.steps, steps, strict=True)):
            assert ours["token_ids"].tolist() == ids and ours["chosen"] == chosen
            assert ours["p_ref"].tolist() == pytest.approx(p, abs=1e-9)
            q = brute_force.next_token_probs(reference, prompt + tokens[:t], temperature)[tokens[t]]
            total += math.log(tilted[chosen]) - math.log(q)
        assert c.log_ratio == pytest.approx(total, abs=1e-6)


PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15]]


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_of_three_models_equals_brute_force(name):
    members, reference = [causal_lm(name, s) for s in (1, 2, 3)], causal_lm(name, 4)
    weights = [0.2, 0.5, 0.3]
    policy = MixturePolicy(members, weights, top_k=6, temperature=0.7)
    assert_like_brute_force(policy, Mixture(members, weights), reference, PROMPTS, 0.7)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_on_one_shared_base_mix_as_their_merged_models_do(name, tmp_path):
    folders = {f"p{s}": write_adapter(tmp_path / f"p{s}", name, s) for s in (1, 2)}
    slow = Mixture([merged(f, name) for f in folders.values()], [0.4, 0.6])
    base = causal_lm(name)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    policies = load_policies(base, folders)
    policy = MixturePolicy(policies, {"p1": 0.4, "p2": 0.6}, top_k=6, temperature=0.7)
    assert_like_brute_force(policy, slow, causal_lm(name), PROMPTS, 0.7)
    assert_like_brute_force(policy, slow, base, PROMPTS, 0.7)  # the base itself is still the reference
    for key, value in base.state_dict().items():  # nothing was merged into the shared weights
        if "lora_" not in key:
            assert torch.equal(value, before[key.replace(".base_layer", "")])


def test_adapters_share_one_base(tmp_path):
    folders = {s: write_adapter(tmp_path / s, "llama_full", i) for i, s in enumerate("ab")}
    base = causal_lm("llama_full")
    first = load_policies(base, {"a": folders["a"]})["a"]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        alone = first(ids).logits
        both = load_policies(base, folders)  # as a later point of a front would: nothing is loaded twice
        assert first.adapter == both["a"].adapter != both["b"].adapter and first.base is both["b"].base is base
        assert not torch.allclose(both["b"](ids).logits, alone)
        assert torch.equal(both["a"](ids).logits, alone) and torch.equal(first(ids).logits, alone)
        assert torch.equal(base(ids).logits, causal_lm("llama_full")(ids).logits)
    with pytest.raises(ValueError, match="no adapter 'c'"):
        AdapterOf(PeftModel.from_pretrained(causal_lm("llama_full"), str(folders["a"])), "c")


def test_a_reward_guided_policy_adds_the_reward_models_log_probabilities():
    reference, arms, weights, beta = causal_lm("gpt2", 0), [causal_lm("gpt2", s) for s in (1, 2)], [0.3, 0.7], 0.5
    policy = RewardGuidedPolicy(reference, arms, weights, arm_beta=beta, top_k=6)

    class Guided(torch.nn.Module):
        def forward(self, **inputs):
            total = reference(**inputs).logits.log_softmax(-1)
            for w, arm in zip(weights, arms, strict=True):
                total = total + w / beta * arm(**inputs).logits.log_softmax(-1)
            return type("Out", (), {"logits": total})

    assert_like_brute_force(policy, Guided(), reference, PROMPTS, 1.0)


def test_what_cannot_be_mixed_is_refused():
    small = causal_lm("llama_full")
    large = type(small)(type(small.config)(**small.config.to_dict() | {"vocab_size": 70}))
    with pytest.raises(ValueError, match=r"one vocabulary; theirs have \[61, 70\]"):
        MixturePolicy([small, large], [0.5, 0.5])
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="arm_beta"):
            RewardGuidedPolicy(small, [small], [1.0], arm_beta=beta)


# --------------------------------------------------------------------------------------------------------------- soups


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [[0.4, 0.6], [0.2, 0.3, 0.5], [0.0, 1.0]])
def test_a_soups_full_matrices_are_the_average_of_the_policies(name, weights, tmp_path):
    """Adapters of different ranks, scales and layers."""
    extra = ["c_proj"] if name == "gpt2" else ["v_proj", "o_proj"]
    options = [{}, {"r": 2, "alpha": 7}, {"r": 3, "alpha": 5, "modules": extra, "use_rslora": True}][: len(weights)]
    folders = [write_adapter(tmp_path / f"a{i}", name, i, **o) for i, o in enumerate(options)]
    argv = ["--adapters", *map(str, folders), "--weights", *map(str, weights), "--output_dir", str(tmp_path / "soup")]
    assert merge.main(argv) == 0
    soup = merged(tmp_path / "soup", name).state_dict()
    parts = [merged(f, name).state_dict() for f in folders]
    changed = 0
    for key, value in soup.items():
        average = sum(w * p[key] for w, p in zip(weights, parts, strict=True))
        assert torch.allclose(value, average, atol=1e-6), key
        changed += not torch.allclose(value, causal_lm(name).state_dict()[key], atol=1e-2)
    assert changed >= 6
    if name == "llama_grouped_tied" and weights == [0.4, 0.6]:  # the product of averages would be something else
        a, b = (load_file(f / "adapter_model.safetensors") for f in folders)
        key = next(k for k in a if k.endswith("q_proj.lora_A.weight"))
        assert load_file(tmp_path / "soup" / "adapter_model.safetensors")[key].shape[0] == len(a[key]) + len(b[key])


def refused(tmp_path, folders, message, weights=("0.5", "0.5"), status=1, capsys=None):
    out = tmp_path / "out"
    argv = ["--adapters", *map(str, folders), "--weights", *weights, "--output_dir", str(out)]
    assert run(lambda: merge.main(argv)) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert not out.exists()


def test_soups_of_what_does_not_belong_together_are_refused(tmp_path, capsys):
    name = "llama_full"
    a, b = (write_adapter(tmp_path / s, name, i) for i, s in enumerate("ab"))
    gpt = write_adapter(tmp_path / "gpt", "gpt2", 0)
    wide = write_adapter(tmp_path / "wide", "llama_grouped_tied", 0, modules=["k_proj"])
    thin = write_adapter(tmp_path / "thin", name, 0, modules=["k_proj"])
    dora = write_adapter(tmp_path / "dora", name, 0, use_dora=True)
    for folders, message in (
        ([a, tmp_path / "no"], f"no adapter_config.json and no adapter_model.safetensors in {tmp_path / 'no'}"),
        ([a, gpt], "the adapters differ in fan_in_fan_out"),
        ([wide, thin], "belong to different bases"),
        ([a, dora], "use_dora=True"),
    ):
        refused(tmp_path, folders, message, capsys=capsys)
    for weights, message in (
        (("0.5", "0.4"), "--weights sum to 0.9; they must sum to 1"),
        (("0.5",), "--weights has 1 numbers for 2 adapters"),
        (("-1", "2"), "not negative"),
        (("nan", "1"), "finite"),
    ):
        refused(tmp_path, [a, b], message, weights, status=2, capsys=capsys)
    refused(tmp_path, [a, a], "names a folder twice", status=2, capsys=capsys)
    for folder, content in ((a, "x"), (b, "y")):
        (folder / "metrics.json").write_text(json.dumps({"base_content": content, "base_model": f"model {content}"}))
    refused(tmp_path, [a, b], "trained on different bases: model x, model y", capsys=capsys)


def test_a_soup_is_made_once_and_only_soups_are_replaced(tmp_path, capsys):
    a, b = (write_adapter(tmp_path / s, "gpt2", i) for i, s in enumerate("ab"))
    out = tmp_path / "soup"
    argv = ["--adapters", str(a), str(b), "--output_dir", str(out), "--weights"]
    assert merge.main([*argv, "0.5", "0.5"]) == 0
    capsys.readouterr()
    assert merge.main([*argv, "0.5", "0.5"]) == 0 and "is complete" in capsys.readouterr().out
    assert run(lambda: merge.main([*argv, "0.1", "0.9"])) == 1
    assert "holds the merged adapter of other settings" in capsys.readouterr().err
    assert merge.main([*argv, "0.1", "0.9", "--rerun"]) == 0
    argv[argv.index(str(out))] = str(a)
    assert run(lambda: merge.main([*argv, "0.5", "0.5", "--rerun"])) == 1
    assert "holds no complete merged adapter" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def policies(rival_world):
    """The world with random single policies, a MORLHF policy and a soup, as the training scripts would leave them."""
    world = rival_world
    dataset = world.config.dataset("anthropic")
    base, _ = models.load_reference(world.config, dataset, CPU)
    path, _ = rivals.reference_path(world.config, dataset)
    from utils.provenance import fingerprint

    folders = {n: rivals.single_folder(world.config, dataset, n) for n in ("help", "harm")}
    folders["both"] = rivals.morlhf_folder(world.config, dataset, {"help": 0.4, "harm": 0.6})
    for seed, folder in enumerate(folders.values()):
        model = get_peft_model(models.load_causal_lm(path, CPU), lora("llama"))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "metrics.json").write_text(json.dumps({"base_content": fingerprint(path), "base_model": path}))
    assert merge.main(["--objectives", "help", "harm", "--weights", "0.4", "0.6", *world.common[:2]]) == 0
    return world


@pytest.fixture
def evaluate(policies, tmp_path):
    """Run an evaluation script on two prompts in a workspace of its own; its run folders."""
    workspace = tmp_path / "ws"
    workspace.mkdir()
    for name in ("base_model", "datasets", "morlhf", "reward_soup", "world"):
        (workspace / name).symlink_to(policies.ws / name)

    def call(script, *arguments, status=0):
        argv = ["--dataset", "anthropic", "--num_prompts", 3, "--num_trials", 2, *arguments, *policies.common]
        main = importlib.import_module(script).main
        assert run(lambda: main([*map(str, argv), "--workspace", str(workspace)])) == status
        return sorted(f.parent for f in workspace.glob("baseline*/anthropic/*/*/args.yaml"))

    call.workspace = workspace
    return call


@pytest.mark.parametrize(
    ("script", "flags", "method"),
    [
        ("baseline_eval", ["--ppo"], "rewarded_soup"),
        ("baseline_eval", ["--morlhf"], "morlhf"),
        ("mod_eval", [], "mod"),
    ],
)
def test_each_trained_baseline_runs_alone_and_as_best_of_n_with_its_kl(evaluate, script, flags, method, policies):
    weights = ("--obj_weights", "0.4,0.6")
    [plain] = evaluate(script, *flags, *weights)
    found = evaluate(script, *flags, *weights, "--num_samples", 3)
    best = next(f for f in found if f != plain)
    assert "baseline_logs" in str(plain) and "baseline_bon_logs" in str(best)
    assert read_arguments(plain)["method"] == method and read_arguments(best)["method"] == f"{method}_best_of_n"
    rewards = {}
    for folder in (plain, best):
        samples = read_samples(folder)
        assert len(samples) == 6 and all(math.isfinite(s["log_ratio"]) for s in samples)
        rewards[folder] = np.mean([0.4 * s["rewards"]["help"] + 0.6 * s["rewards"]["harm"] for s in samples])
    assert rewards[best] > rewards[plain]
    added = math.log(3) - 2 / 3
    summary = (best / "summary.txt").read_text()
    assert read_arguments(best)["kl_added"] == pytest.approx(added)
    assert f"estimated + at most {added:.4f} by choosing one of N" in summary


def test_the_kl_of_a_policy_is_its_own_log_probability_less_the_references(evaluate, policies):
    """Recomputed from the answers' texts with merged weights, the slow way."""
    [folder] = evaluate("baseline_eval_KL", "--morlhf", "--obj_weights", "0.4,0.6")
    dataset = policies.config.dataset("anthropic")
    base, tokenizer = models.load_reference(policies.config, dataset, CPU)
    adapter = policies.ws / "morlhf" / "anthropic" / "help_harm" / "morlhf_0.4"
    own = merge_adapter(models.load_reference(policies.config, dataset, CPU)[0], adapter)
    from utils.data import encode_prompts

    for sample in read_samples(folder):
        [prompt] = encode_prompts(dataset, tokenizer, [sample["prompt"]])
        response = tokenizer(sample["response"], add_special_tokens=False)["input_ids"]
        response += [tokenizer.eos_token_id] * sample["finished"]
        if len(response) != sample["tokens"]:
            continue  # special tokens within the answer are not in its text
        total = 0.0
        for t, token in enumerate(response):
            p = brute_force.next_token_probs(own, prompt + response[:t], 1.0)
            q = brute_force.next_token_probs(base, prompt + response[:t], 1.0)
            total += math.log(p[token] / p.topk(15).values.sum()) - math.log(q[token])
        assert sample["log_ratio"] == pytest.approx(total, abs=1e-3)


def test_the_kl_script_takes_the_references_kl_too_and_knows_the_other_scripts_runs(evaluate, capsys):
    [plain] = evaluate("baseline_eval")
    capsys.readouterr()
    assert evaluate("baseline_eval_KL") == [plain] and "is complete and is not repeated" in capsys.readouterr().out
    found = evaluate("baseline_eval_KL", "--rerun")
    assert len(found) == 2
    ours, theirs = ([s["log_ratio"] for s in read_samples(f)] for f in found)
    assert ours == pytest.approx(theirs, abs=1e-3)  # one pass over the text, and the decoder's own sum


def test_at_a_weight_of_1_every_trained_baseline_is_the_single_policy_which_runs_once(evaluate, capsys):
    [folder] = evaluate("baseline_eval", "--ppo", "--obj_weights", ",1")
    for script, flags in (("baseline_eval", ["--morlhf"]), ("mod_eval", [])):
        assert evaluate(script, *flags, "--obj_weights", ",1") == [folder]
        assert "is complete and is not repeated" in capsys.readouterr().out
    assert read_arguments(folder)["method"] == "single_policy"
    paths = read_arguments(folder)["setting"]["checkpoints"].values()
    assert any(p.endswith("morlhf/anthropic/single/harm") for p in paths)
    [reference] = [f for f in evaluate("baseline_eval") if read_arguments(f)["method"] == "reference"]
    assert [s["response"] for s in read_samples(folder)] != [s["response"] for s in read_samples(reference)]
    evaluate("mod_eval", "--obj_weights", ",1", "--num_samples", 2)
    found = evaluate("baseline_eval", "--ppo", "--obj_weights", ",1", "--num_samples", 2)
    assert sorted(read_arguments(f)["method"] for f in found) == [
        "reference", "single_policy", "single_policy_best_of_n",
    ]  # fmt: skip


def test_a_folder_of_ones_own_keeps_the_methods_name(evaluate, policies):
    single = policies.ws / "morlhf" / "anthropic" / "single"
    [folder] = evaluate("mod_eval", "--obj_weights", ",1", "--single_dir", single)
    assert read_arguments(folder)["method"] == "mod"


def test_missing_and_foreign_adapters_are_named_with_the_command_that_makes_them(evaluate, policies, tmp_path, capsys):
    for script, flags, said in (
        ("baseline_eval", ["--ppo", "--obj_weights", "0.2,0.8"],
         ["help_harm/reward_soup_0.2", "Finetuning/reward_soup_merge.py", "--objectives help harm --weights 0.2 0.8"]),
        ("baseline_eval", ["--morlhf", "--obj_weights", "0.2,0.8"],
         ["help_harm/morlhf_0.2", "Finetuning/PPO/ppo.py", "--reward_models help harm --reward_weights 0.2 0.8"]),
        ("mod_eval", ["--obj_weights", "0.5,0.5", "--single_dir", tmp_path], [str(tmp_path / "help"), "ppo.py"]),
        ("baseline_eval", ["--arm", "--arm_beta", 1, "--obj_weights", "1"], ["arm/anthropic/help", "train_arm.py"]),
    ):  # fmt: skip
        assert evaluate(script, *flags, status=1) == []
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(s in error for s in said), error
    foreign = tmp_path / "single" / "help"
    shutil.copytree(policies.ws / "morlhf" / "anthropic" / "single" / "help", foreign)
    (foreign / "metrics.json").write_text(json.dumps({"base_content": "0", "base_model": "another/model"}))
    assert evaluate("mod_eval", "--obj_weights", "1", "--single_dir", tmp_path / "single", status=1) == []
    assert "was trained on another base (another/model)" in capsys.readouterr().err
    (foreign / "metrics.json").unlink()
    shutil.copytree(write_adapter(tmp_path / "x", "llama_full", 0), foreign, dirs_exist_ok=True)
    assert evaluate("mod_eval", "--obj_weights", "1", "--single_dir", tmp_path / "single", status=1) == []
    assert "does not fit its base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("baseline_eval", ["--ppo"], "--ppo needs --obj_weights"),
        ("baseline_eval", ["--ppo", "--morlhf", "--obj_weights", "1"], "--ppo and --morlhf name two baselines"),
        ("baseline_eval", ["--morlhf", "--obj_weights", "0.5,0.4"], "sum to 0.9"),
        ("baseline_eval", ["--morlhf", "--obj_weights", "1", "--beta", "1"], "--beta has no meaning for the morlhf"),
        ("baseline_eval", ["--morlhf", "--obj_weights", "1", "--arm_beta", "1"], "--arm_beta has no meaning"),
        ("baseline_eval", ["--arm", "--obj_weights", "1"], "--arm needs --arm_beta"),
        ("baseline_eval", ["--arm", "--obj_weights", "1", "--arm_beta", "0"], "--arm_beta must be a finite number"),
        ("mod_eval", [], "--mod needs --obj_weights"),
        ("mod_eval", ["--obj_weights", "1", "--num_samples", "0"], "--num_samples must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(evaluate, capsys, script, arguments, said):
    assert evaluate(script, *arguments, status=2) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_what_a_training_took_is_counted_from_what_it_left(rival_world, tmp_path):
    import csv

    from tests.test_cli import load

    for name in ("base_model", "datasets", "world"):
        (tmp_path / name).symlink_to(rival_world.ws / name)
    world = [*rival_world.common, "--workspace", str(tmp_path)]
    script, output = load("scripts/training_work.py"), tmp_path / "work.json"
    with pytest.raises(DataError, match="no value model and no policy"):
        script.main([*world])
    trained = ["--exp_type", "assistant", "--reward_models", "help", "--max_steps", "2"]
    assert load("Finetuning/PPO/ppo.py").main([*trained, *world]) == 0
    assert script.main(["--output", str(output), *world]) == 0
    [row] = json.loads(output.read_text())["rows"]
    assert row["what"] == "policy single/help, 2 steps"
    with open(tmp_path / "morlhf" / "anthropic" / "single" / "help" / "training_log.csv", newline="") as file:
        steps = list(csv.DictReader(file))
    assert row["generated"] == round(sum(8 * float(s["tokens"]) for s in steps))
    assert row["trained"] > row["generated"] and row["tflop"] > 0 and row["seconds"] == float(steps[-1]["seconds"])
