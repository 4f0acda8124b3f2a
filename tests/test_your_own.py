"""docs/your_own.md is run as it stands: its files are written, its commands executed, and its front looked at."""

import contextlib
import csv
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from tests.test_cli import SCRIPTS, load
from utils.cli import run
from utils.config import REPOSITORY

PAGE = (REPOSITORY / "docs" / "your_own.md").read_text()
PLACE = "workspaces/mine"  # what the page calls its folder; the test's is another


def blocks(page):
    """(file name or "", language, text) of each fenced block; a name stands alone in the paragraph before it."""
    for match in re.finditer(r"(?:^`([^`\n]+)`\n\n)?^```(\w+)\n(.*?)^```$", page, re.M | re.S):
        yield match[1] or "", match[2], match[3]


def commands(text):
    """The words of each command of a bash block."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def execute(words, patch):
    """One command's output: a script of the repository in this process, any other in one of its own."""
    if words[0] == "export":
        name, value = words[1].split("=", 1)
        patch.setenv(name, value.replace("$PWD", str(REPOSITORY)))  # where the page's commands are given
        return ""
    assert words[0] == "python" and not set("|;&$<>") & set("".join(words)), f"not a plain command: {words}"
    if words[1] not in SCRIPTS:
        return subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, text=True).stdout
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(lambda: load(words[1]).main(words[2:]))
    assert status == 0, (words, err.getvalue())
    return out.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The page, run from top to bottom, in about 40 s on one core."""
    folder = tmp_path_factory.mktemp("your_own") / "mine"
    printed = {}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(sys.modules.pop, "my_rewards", None)
        for name in ("DATA_DIR", "MAVIS_DEBUG", "MAVIS_CONFIG"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        for name, language, text in blocks(PAGE.replace(PLACE, str(folder))):
            if name:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text(text)
            elif language == "bash":
                for words in commands(text):
                    printed[shlex.join(words)] = execute(words, patch)
        assert not any(Path.cwd().iterdir())
    return SimpleNamespace(folder=folder, printed=printed)


def rewards(folder, method, objectives, weights=""):
    """{objective: (prompts,) means over trials} of the one run of that method and these weights."""
    [file] = folder.glob(f"*_logs/talk/{objectives}/{method}_{weights}*/rewards.csv")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    return {name: np.array([float(row[name]) for row in rows]) for name in ("on_topic", "warm")}


def test_the_page_ends_in_a_front_with_a_table_and_pictures(world):
    report = world.folder / "report"
    text = (report / "report.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", text)
    assert pictures and all((report / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "my world" in text and "| mavis, beta 4 | on_topic 0.5, warm 0.5 |" in text
    table = next(out for command, out in world.printed.items() if "pareto_report.py" in command)
    assert table.count("mavis, beta 4  ") >= 5 and "reference " in table and "token table, beta 4" in table
    assert json.loads((report / "report.json").read_text())["sections"]


def test_steering_does_what_the_page_says(world):
    """Paired by prompt: each reward rises by more than 4 standard errors where it has all the weight, and the front is
    monotone in its ends; the token table does nothing for the reward that needs the question. In the page's run the
    rises are 9 and 10 standard errors."""
    reference = rewards(world.folder, "reference", "on_topic_warm")
    steered = {name: rewards(world.folder, "mavis", name, "1_") for name in ("on_topic", "warm")}
    middle = rewards(world.folder, "mavis", "on_topic_warm", "0.5-0.5")

    def rise(name, values):
        difference = values[name] - reference[name]
        return difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5

    for name in steered:
        mean, error = rise(name, steered[name])
        assert mean > 4 * error, (name, mean, error)
        other = steered["warm" if name == "on_topic" else "on_topic"]
        assert other[name].mean() < middle[name].mean() < steered[name][name].mean() + 0.2
    table, error = rise("on_topic", rewards(world.folder, "token_table", "on_topic", "1_"))
    assert table < 2 * error and table < 0.5 * rise("on_topic", steered["on_topic"])[0]


def test_what_the_stages_say_is_what_the_page_says_they_say(world):
    said = "\n".join(world.printed.values())
    explained = dict(re.findall(r"(\w+): within a prompt, tokens explain (-?\d\.\d+) of the reward's variance", said))
    assert abs(float(explained["on_topic"])) < 0.1 and 0.5 < float(explained["warm"]) < 0.8
    spread = dict(re.findall(r"(\w+): standard deviation of the leaves (\d+\.\d+)", said))
    assert 0.4 < float(spread["on_topic"]) / float(spread["warm"]) < 2.5  # rewards of like size
    assert re.search(r"warm: held-out accuracy \d+\.\d% \(95 %", said)
    answer = r"\n.*\n\[on_topic \d+\.\d+, warm .*\n"
    ends = rf"\n\nwarm 1, beta 4:{answer}\non_topic 1, beta 4:{answer}"
    assert re.search("> tell me of ice and snow and tea" + ends, said)


def test_the_pages_own_method_stands_in_the_report_with_its_kl(world):
    """A lower temperature without a top-k cut; that its answers are scored right is tests/test_given_answers.py's."""
    [section] = json.loads((world.folder / "report" / "report.json").read_text())["sections"]
    [cool] = [run for run in section["runs"] if run["series"] == "cool"]
    assert cool["prompts"] == 40 and cool["trials"] == 3 and cool["kl"] > 0 and cool["seconds_per_prompt"] > 0
    assert set(cool["rewards"]) == {"on_topic", "warm"}
    assert "| cool |" in (world.folder / "report" / "report.md").read_text()


def test_steering_from_python_gives_what_the_script_gives(world):
    said = world.printed[f"python {world.folder}/steer.py"]
    answers = dict(re.findall(r"^(.*): (.*) \[log-ratio -?\d+\.\d\d\]$", said, re.M))
    assert list(answers) == [
        "on_topic 0, warm 1", "on_topic 0.5, warm 0.5", "on_topic 1, warm 0", "the question's own words"
    ]  # fmt: skip
    [script] = [out for command, out in world.printed.items() if "--prompt" in command]
    for name, weights in (("warm 1", "on_topic 0, warm 1"), ("on_topic 1", "on_topic 1, warm 0")):
        assert f"\n{name}, beta 4:\n{answers[weights]}\n" in script
    assert set(["ice", "snow", "tea"]) & set(answers["the question's own words"].split())


def test_no_test_prompt_was_trained_on(world):
    def prompts(split):
        with (world.folder / f"datasets/talk/talk_{split}_deduped.csv").open(newline="") as file:
            return {row["prompt"] for row in csv.DictReader(file)}

    assert len(prompts("test")) >= 40 and not prompts("train") & prompts("test")


def test_the_page_names_only_functions_and_files_that_are_there():
    small_world = yaml.safe_load((REPOSITORY / "configs/smollm.yaml").read_text())
    shown = [yaml.safe_load(text) for name, language, text in blocks(PAGE) if language == "yaml" and not name]
    assert shown == [{"relevance": small_world["objectives"]["relevance"]}]
    module, name = shown[0]["relevance"]["function"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (REPOSITORY / "docs" / link).exists(), link
