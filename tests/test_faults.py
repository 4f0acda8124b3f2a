"""Stages that are killed, meet a full or read-only disk, or run twice at once, end as they must: see tests/faults.py.

The faults are put by a process of their own, since its children are forked, which must not be done where torch has
threads.
"""

import json
import subprocess
import sys

import pytest

from tests import faults
from utils.config import REPOSITORY

NAIVE = '''
"""A stage as it must not be: it writes in place, takes what is there for complete, and lets two in at once."""

import os
import pathlib


def main(argv):
    file = pathlib.Path(argv[0]) / "result.txt"
    if not file.exists():
        with open(file, "w") as stream:
            for part in range(4):
                stream.write(f"part {part}\\n")
                stream.flush()
                with open(file.with_name("progress"), "w") as progress:
                    progress.write(str(part))
    if not file.with_name("done").exists():
        file.with_name("scratch").write_text("all")
        os.rename(file.with_name("scratch"), file.with_name("done"))
    return 0
'''
BOTH = """
import json, sys, tempfile
from pathlib import Path
from tests import faults
faults.import_all()
put = json.loads(sys.argv[3])
sys.path.insert(0, sys.argv[1])
faults.STAGES["naive"] = faults.Stage("naive", "naive_stage", "{ws}", common=False)
found = {}
with tempfile.TemporaryDirectory() as folder:
    world = faults.World(Path(folder), Path(sys.argv[2]))
    for name, moments, chosen in (("naive", 3, put), ("label_tree", 1, [*put, faults.READ_ONLY])):
        trial = faults.Trial(world, faults.STAGES[name])
        found[name] = {f: (t.moments, t.failures or []) for f in chosen for t in [trial.run(f, moments)]}
print(json.dumps(found))
"""


def run(*command, seconds):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds
    )
    return done.returncode, done.stdout, done.stderr


def test_a_stage_is_unbreakable_and_a_naive_one_is_found_out(tiny_world, tmp_path):
    (tmp_path / "naive_stage.py").write_text(NAIVE)
    put = json.dumps([faults.KILL, faults.FULL, faults.TWICE])
    status, out, err = run("-c", BOTH, tmp_path, tiny_world, put, seconds=300)
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    naive = found.pop("naive")
    for fault in json.loads(put):
        assert naive[fault][1], f"a naive stage was not found out by {fault}"
    for stage, of_stage in found.items():
        for fault, (moments, failures) in of_stage.items():
            assert not failures, f"{stage}, {fault}: {failures}"
            assert moments


@pytest.mark.slow
@pytest.mark.parametrize("stage", faults.STAGES)
def test_no_fault_breaks_a_stage(stage, tiny_world):
    """Twenty moments of each fault."""
    status, out, err = run("tests/faults.py", "--moments", 20, "--stages", stage, "--base", tiny_world, seconds=3600)
    assert status == 0, out + err


def test_every_stage_that_writes_is_put_to_the_test():
    """A script that is not here writes nothing, or is another name of one that is."""
    others = {
        "baseline_eval_KL",
        "mod_eval",
        "label_tree_soft",
        "convert_trees",
    }  # the last: tests/test_pickled_trees.py
    scripts = {p.stem for p in [*REPOSITORY.glob("*.py"), *(REPOSITORY / "Finetuning").rglob("*.py")]}
    assert scripts - others == {stage.module for stage in faults.STAGES.values()}
