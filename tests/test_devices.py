"""Every stage of the project's own on a GPU that is pretended: no tensor is left on the wrong side."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import small_runs
from tests.pretend_gpu import GPU, OnGpu, pretended_gpu
from tests.test_decoding import make_prompts
from tests.test_graphs import KINDS, Maker
from tests.test_rivals import load_script
from utils.decoding import beam_search, decode


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpu():
        here, there = torch.arange(4.0), torch.arange(4.0, device="cuda")
        assert there.device == GPU and (there + 1).device == GPU and there[1:].is_cuda
        assert torch.equal((there * 2).cpu(), here * 2) and (there * torch.tensor(2.0)).is_cuda
        assert there[torch.tensor([1])].tolist() == [1.0]
        for mistake in (
            lambda: there + here,
            lambda: torch.cat([here, there]),
            lambda: here[torch.tensor([1], device="cuda")],
            lambda: torch.where(there > 1, there, here),
            lambda: torch.nn.Linear(4, 1)(there),
            lambda: there.numpy(),
            lambda: there.new_zeros(4, device="cpu") + there,
            lambda: there.index_put_((torch.tensor([1]),), torch.ones(1)),
            lambda: there.__setitem__(torch.tensor([1, 2]), torch.ones(2)),
            lambda: torch.stack([torch.tensor(1.0), there[0]]),
            lambda: torch.as_tensor(there).numpy(),
            lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
            lambda: there.uniform_(generator=torch.Generator()),
        ):
            with pytest.raises((RuntimeError, TypeError), match="device"):
                mistake()


@pytest.mark.parametrize("kind", KINDS)
def test_every_policy_decodes_there_what_it_decodes_on_a_cpu(kind):
    prompts, keys = make_prompts(5), [(0, i) for i in range(5)]
    how = dict(keys=keys, max_new_tokens=8, eos_token_id=2, batch_size=3, suppress_first_eos=True)
    beams = dict(keys=keys, num_beams=2, num_return=2, max_new_tokens=5, eos_token_id=2, batch_size=4)
    expected = getattr(Maker(), kind)()
    with pretended_gpu():
        policy = getattr(Maker(device="cuda"), kind)()
        assert policy.device == GPU
        found = decode(policy, prompts, **how)
        searched = beam_search(policy, prompts, **beams) if hasattr(policy, "beta") else []
    assert [c.token_ids for c in found] == [c.token_ids for c in decode(expected, prompts, **how)]
    if searched:
        again = beam_search(expected, prompts, **beams)
        assert [[c.token_ids for c in of_prompt] for of_prompt in searched] == [
            [c.token_ids for c in of_prompt] for of_prompt in again
        ]


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_gpu")
    made = small_runs(tiny_world, folder, device="cuda:0")
    file = folder / "world.yaml"
    (folder / "half.yaml").write_text(file.read_text().replace("gpu_dtype: float32", "gpu_dtype: bfloat16"))
    return made


DATA = ("--dataset", "anthropic")
TREES, LABELLED = "{ws}/tree_data/anthropic/iter_0", "{ws}/labelled"
TRAIN = ("train_value_model.py", "--data_dir", LABELLED, *DATA, "--num_epochs", "1")
POINT = (*DATA, "--num_prompts", "3", "--num_trials", "2", "--obj_weights", "0.5,0.5")
PPO = ("Finetuning/PPO/ppo.py", "--exp_type", "assistant", "--max_steps", "1", "--reward_models")
NO_MODEL = {"split_data.py", "label_tree.py", "label_tree_soft.py", "fit_token_table.py", "fit_judges.py",
            "Finetuning/reward_soup_merge.py"}  # fmt: skip
STAGES = [
    ("get_data_base.py", "0", "6", *DATA),
    ("label_tree.py", TREES, "all", *DATA),
    ("split_data.py", TREES, "--num_val", "2", "--output_dir", LABELLED, *DATA),
    (*TRAIN, "--objective", "all"),
    (*TRAIN, "--objective", "help", "--packing", "node", "--output_dir", "{ws}/by_node"),
    (*TRAIN, "--objective", "help", "--targets", "dense", "--head_start", "ridge", "--output_dir", "{ws}/from_ridge"),
    (*TRAIN, "--objective", "help", "--init_checkpoint", "{ws}/value_models/iter_0/help", "--output_dir", "{ws}/again"),
    (*TRAIN, "--objective", "help", "--KL_penalty", "0.1", "--output_dir", "{ws}/with_kl"),
    ("label_tree_soft.py", TREES, "help", *DATA),
    ("fit_judges.py", *DATA),
    ("fit_token_table.py", LABELLED, "all", *DATA),
    ("fit_candidate_heads.py", "all", *DATA, "--num_prompts", "6"),
    ("baseline_eval.py", *DATA, "--num_prompts", "3"),
    ("baseline_eval.py", *POINT, "--num_samples", "3"),
    ("baseline_eval.py", *POINT, "--token_table", "--beta", "2"),
    ("baseline_eval.py", *DATA, "--num_prompts", "3", "--prompt_words", "--beta", "2"),
    ("mavis.py", *POINT, "--beta", "2"),
    ("mavis.py", *POINT, "--beta", "2", "--config", "{folder}/half.yaml", "--num_trials", "1"),
    ("mavis.py", *POINT, "--beta", "2", "--preset", "v3"),
    ("mavis.py", *DATA, "--obj_weights", "0.5,0.5", "--beta", "2", "--prompt", "a galook"),
    ("mavis.py", *POINT, "--beta", "2", "--value_adapters", "stacked"),
    ("mavis.py", *POINT, "--beta", "2", "--value_head", "candidates"),
    ("mavis_bs.py", *POINT, "--beta", "2", "--Q", "3"),
    ("get_data_iter.py", "0", "4", "help", *DATA, "--beta", "2"),
    (*PPO, "help"),
    (*PPO, "harm"),
    (*PPO, "help", "harm", "--alpha", "0.5"),
    ("Finetuning/reward_soup_merge.py", "--objectives", "help", "harm", "--weights", "0.5", "0.5", *DATA),
    ("Finetuning/ARM/train_arm.py", "--objective", "help", *DATA),
    ("Finetuning/ARM/train_arm.py", "--objective", "harm", *DATA),
    ("baseline_eval_KL.py", *POINT, "--morlhf"),
    ("baseline_eval_KL.py", *POINT, "--ppo"),
    ("baseline_eval_KL.py", *POINT, "--arm", "--arm_beta", "1"),
    ("mod_eval.py", *POINT),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: " ".join(stage[:4])[:60])
def test_every_stage_runs_there(world, stage, monkeypatch):
    """In their order: each takes what the ones before it have made."""
    monkeypatch.setenv("MAVIS_DEBUG", "1")
    path, *arguments = (part.format(ws=world.ws, folder=world.folder) for part in stage)
    script = load_script(path) if "/" in path else importlib.import_module(path.removesuffix(".py"))
    before = OnGpu.operations
    with pretended_gpu():
        assert not script.main([*world.common, *arguments])
    assert (OnGpu.operations - before > 100) == (path not in NO_MODEL)


def test_given_answers_are_read_there(world, monkeypatch, tmp_path):
    import answers_eval
    from utils.runs import read_samples

    [folder] = world.ws.glob("baseline_logs/anthropic/*/reference_*")
    rows = [{"index": s["index"], "trial": s["trial"], "response": s["response"], "log_prob": -20.0}
            for s in read_samples(folder)]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = OnGpu.operations
    with pretended_gpu():
        assert not answers_eval.main(
            [str(tmp_path / "answers.jsonl"), *DATA, "--method_name", "mine", "--num_prompts", "3", *world.common]
        )
    assert OnGpu.operations > before


def test_adapters_are_read_on_the_cpu_whichever_gpu_is_asked_for(monkeypatch, tiny_world, tmp_path):
    """PEFT by itself would read them on the first GPU: of eight processes, each on its own GPU, all would open it."""
    from peft import LoraConfig, get_peft_model

    from tests.models_for_tests import causal_lm
    from utils.adapters import load_policies

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(causal_lm("llama_full"), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    read = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.safe_load_file",
        lambda file, device="cpu", **more: read.append(str(device)) or load_file(file),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shutil.copytree(tmp_path / "adapter", tmp_path / "another")
    load_policies(causal_lm("llama_full"), {"a": tmp_path / "adapter", "b": tmp_path / "another"})
    assert read == ["cpu", "cpu"]
