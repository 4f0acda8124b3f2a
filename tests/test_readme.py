"""Every command of the README is run as it stands, in the tiny world, with small numbers in place of large ones."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.test_cli import SCRIPTS, load
from utils.cli import run
from utils.config import REPOSITORY

# What makes a command small; what a stage asks for by itself comes from the configuration.
SMALL = {
    "Finetuning/SFT/sft.py": ["--max_steps", "2"],
    "Finetuning/PPO/ppo.py": ["--max_steps", "1", "--batch_size", "4", "--mini_batch_size", "4"],
    "split_data.py": ["--num_val", "6"],
    "fit_candidate_heads.py": ["--num_prompts", "10", "--num_epochs", "1"],
    "train_value_model.py": ["--num_epochs", "1"],
    **dict.fromkeys(
        ("mavis.py", "mavis_bs.py", "baseline_eval.py", "baseline_eval_KL.py", "mod_eval.py", "answers_eval.py"),
        ["--num_prompts", "3", "--num_trials", "1"],
    ),
}
WORDS = {"5000": "20", "How do I learn to swim?": "what is marook"}  # the tiny world's rewards need one of its words
BUDGET = "19"  # nats: the cut to 15 tokens alone costs this base, which was hardly trained, more than 16
ELSEWHERE = {"scripts/quickstart.sh", "scripts/test.sh", "scripts/smollm/run.sh"}  # long; each has its own test or run


def readme_commands() -> list[list[str]]:
    """The words of every command in the README's blocks of bash."""
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / "README.md").read_text())
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_readmes_commands_run_in_the_tiny_world(tiny_world, tmp_path, monkeypatch, capfd):
    for part in tiny_world.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "reward_models").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)  # the paper's workspace is the folder itself, so that the README's paths are relative
    world = ["--config", str(REPOSITORY / "configs" / "tiny.yaml"), "--workspace", str(tmp_path)]
    assert (
        run(
            lambda: load("Finetuning/RM/train_reward_model.py").main(
                ["--objective", "humor", "--max_rows", "40", *world]
            )
        )
        == 0
    )

    rows = [{"index": i, "response": "marook"} for i in range(3)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # "wherever they were made"

    ran = set()
    for words in readme_commands():
        words = [w for w in words if "=" not in w or w.startswith("-")]  # DATA_DIR=... bash ...
        program, script, *rest = words
        if script in ELSEWHERE:
            continue
        rest = [WORDS.get(word, word) for word in rest]
        if "--kl_budget" in rest:
            rest[rest.index("--kl_budget") + 1] = BUDGET
        if program == "bash":
            environment = os.environ | {"MAVIS_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
            command = ["bash", script, *rest, *world]
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
        else:
            assert program == "python" and script in SCRIPTS, words
            each, its_world = [rest], [] if script == "pareto_report.py" else world  # which reads run folders alone
            if script == "train_value_model.py":  # "and so for each objective"
                each = [[{"help": o}.get(word, word) for word in rest] for o in ("help", "harm", "humor")]
            for arguments in each:
                status = run(lambda: load(script).main([*arguments, *SMALL.get(script, []), *its_world]))  # noqa: B023
                assert status == 0, (script, arguments, capfd.readouterr().err[-2000:])
        ran.add(script)
    assert len(ran) >= 15
    for made in (
        "value_models/iter_0/help/adapter_model.safetensors",
        "morlhf/anthropic/single/help/adapter_config.json",
        "reward_soup/anthropic/help_harm/reward_soup_0.4",
        "report/anthropic_help_harm/report.html",
    ):
        assert Path(made).exists(), made
