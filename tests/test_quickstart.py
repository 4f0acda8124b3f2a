"""The quickstart, from an empty workspace to a front that means something."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_quickstart_ends_with_a_front_that_value_models_reach_and_a_token_table_does_not(tmp_path):
    """The whole chain: about 5 minutes. What is asserted is about half of the usual gains, so that another machine's
    arithmetic does not fail it: a value model adds 0.6 to 0.7 to its reward, a token table nothing."""
    workspace = tmp_path / "tiny"
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=ROOT,
        env=os.environ | {"WORKSPACE": str(workspace)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    front = workspace / "report" / "anthropic_help_harm_front.png"
    assert front.stat().st_size > 10_000 and str(front) in done.stdout

    [section] = json.loads((workspace / "report" / "report.json").read_text())["sections"]
    means = {
        (run["method"], run["weights"].get("help", 0.0)): [run["rewards"][name]["mean"] for name in ("help", "harm")]
        for run in section["runs"]
        if run["weights"] or run["method"] == "reference"
    }
    reference = means["reference", 0.0]
    steered = [means["mavis", weight] for weight in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    for reward, end in ((0, steered[-1]), (1, steered[0])):  # each value model alone, at weight 1
        assert end[reward] - reference[reward] > 0.3
        assert end[reward] - means["token_table", 1.0 - reward][reward] > 0.25
    for before, after in zip(steered, steered[1:], strict=False):  # 0.08: two standard errors of a difference
        assert after[0] > before[0] - 0.08 and after[1] < before[1] + 0.08
    assert steered[3][0] + steered[3][1] > sum(reference) + 0.3, "both rewards rise between the ends"
