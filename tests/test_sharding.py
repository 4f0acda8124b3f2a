"""Several processes make what one makes, take work as it comes, and leave nothing that stands in another's way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import get_data_base
import label_tree
from tests.toy_world import Script, make_toy, run_folders, status
from utils import sharding
from utils.errors import UsageError
from utils.runs import read_samples
from utils.sharding import Claims, Process, chunks, share, this_process

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------- processes


def test_the_launcher_says_which_process_this_is():
    assert this_process({}) == Process(0, 1) and this_process({}).first and not this_process({}).several
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert this_process(torchrun) == Process(3, 4, 1) and str(this_process(torchrun)) == "process 3 of 4"
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert this_process(mpi) == Process(1, 2) and not this_process(mpi).first


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "numbers run from 0"),
        ({"RANK": "1"}, "only one of RANK and WORLD_SIZE"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "'-1'"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(environment, said):
    with pytest.raises(UsageError, match=said):
        this_process(environment)


def test_each_process_of_a_machine_has_its_own_gpu():
    from utils.errors import DataError
    from utils.models import own_gpu

    assert [str(own_gpu(r, 4)) for r in (None, 0, 3)] == ["cuda", "cuda:0", "cuda:3"]
    assert str(own_gpu(3, 1)) == "cuda"  # the launcher shows each process one
    with pytest.raises(DataError, match="has 2 CUDA devices, and this is its process 3; start 2"):
        own_gpu(2, 2)


# ------------------------------------------------------------------------------------------------------------- claims

HAMMER = """
import json, sys, time
sys.path.insert(0, {root!r})
from utils.sharding import Claims
with Claims({folder!r}) as claims:
    taken = [n for n in range({units}) if claims.take(str(n))]
    print(json.dumps(taken), flush=True)
    if {stay}:
        time.sleep(60)
    sys.stdin.read()
"""


def hammer(folder, units, stay=False):
    code = HAMMER.format(root=str(ROOT), folder=str(folder), units=units, stay=stay)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_no_claim_is_lost_or_doubled_among_many_processes_and_threads(tmp_path):
    units, taken = 300, []

    def thread():
        with Claims(tmp_path / "threads") as claims:
            barrier.wait()
            mine = [n for n in range(units) if claims.take(str(n))]
            barrier.wait()  # a claim counts while its holder lives
            taken.extend(mine)

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=thread) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(taken) == list(range(units))

    processes = [hammer(tmp_path / "processes", units) for _ in range(4)]
    taken = [n for p in processes for n in json.loads(p.stdout.readline())]
    for p in processes:
        p.communicate("")
    assert sorted(taken) == list(range(units)) and all(p.returncode == 0 for p in processes)


def test_a_killed_process_loses_its_claims_to_exactly_one_other(tmp_path):
    killed = hammer(tmp_path, 50, stay=True)
    assert json.loads(killed.stdout.readline()) == list(range(50))
    with Claims(tmp_path) as alive:
        assert not any(alive.take(str(n)) for n in range(50))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed.stdin.close(), killed.stdout.close()
        taken, barrier = [], threading.Barrier(6)

        def thread():
            with Claims(tmp_path) as claims:
                barrier.wait()
                mine = [n for n in range(50) if claims.take(str(n))]
                barrier.wait()
                taken.extend(mine)

        threads = [threading.Thread(target=thread) for _ in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert Counter(taken) == Counter(range(50))


def test_another_machines_process_counts_until_its_heart_has_stopped_for_a_lease(tmp_path, monkeypatch):
    beat = 0.05
    with Claims(tmp_path, lease=0.6, beat=beat) as here:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(sharding, "machine", lambda: "elsewhere/boot/1")
            there = Claims(tmp_path, beat=beat)
            there.__enter__()
            assert there.take("a") and there.take("b")
            end = time.monotonic() + 1.2
            while time.monotonic() < end:  # it beats: two leases long its claim counts
                assert not here.take("a")
                time.sleep(0.05)
            there._ended.set()  # it is killed: nothing is cleaned up
            time.sleep(3 * beat)
        assert not here.take("a")
        began = time.monotonic()
        while not here.take("a"):
            assert time.monotonic() - began < 5
            time.sleep(0.02)
        assert time.monotonic() - began > 0.4
        assert here.take("b") and not here.take("b")


def test_a_claim_whose_process_was_killed_in_the_moment_of_claiming_ends_too(tmp_path):
    with Claims(tmp_path, lease=0.2) as claims:
        (tmp_path / "a.0").touch()
        assert not claims.take("a")
        time.sleep(0.3)
        assert claims.take("a") and (tmp_path / "a.1").exists()


def test_work_is_taken_as_it_comes_and_what_was_done_meanwhile_is_not_repeated(tmp_path):
    """A process that is four times slower does less; every unit is done once."""
    finished, doers = set(), Counter()

    def work(name, seconds):
        with Claims(tmp_path) as claims:
            for unit in share(chunks(list(range(40)), 2), done=lambda u: u[0] in finished, claims=claims, wait=True):
                time.sleep(seconds)
                doers[name, unit[0]] += 1
                finished.add(unit[0])

    threads = [threading.Thread(target=work, args=a) for a in (("fast", 0.01), ("slow", 0.04))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    counts = Counter(name for name, _ in doers)
    assert len(doers) == 20 and set(doers.values()) == {1} and counts["fast"] > counts["slow"] > 0
    assert chunks([5, 6, 7], 2) == {"0000000-0000001": [5, 6], "0000002-0000002": [7]}


def test_who_does_not_wait_leaves_others_work_and_who_waits_takes_over_what_they_leave(tmp_path):
    finished = set()

    def units(claims, wait):
        for unit in share({"a": "a", "b": "b"}, done=finished.__contains__, claims=claims, wait=wait):
            finished.add(unit)
            yield unit

    other = Claims(tmp_path)
    with other:
        assert other.take("a")
        with Claims(tmp_path) as mine:
            assert list(units(mine, wait=False)) == ["b"]
            waiting = threading.Timer(0.3, lambda: other.__exit__())
            waiting.start()
            assert list(units(mine, wait=True)) == ["a"]
            waiting.join()


def test_who_comes_when_all_is_done_leaves_nothing(tmp_path):
    with Claims(tmp_path / "claims" / "a") as claims:
        assert list(share({"a": 1}, done=lambda unit: True, claims=claims)) == []
    assert not list(tmp_path.iterdir())
    with Claims(tmp_path / "claims" / "a") as claims:
        sharding.forget(tmp_path / "claims" / "a")
        assert not claims.take("a")  # the first process has removed the folder: nothing is left to do
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- stages, launched

TREES = ["--data_split", "test", "--root_children", "3", "--non_root_children", "2", "--num_layers", "2"]
EVALUATIONS = [
    ["mavis", "--obj_weights", "1", "--obj_weights", "0.25,0.75", "--beta", "2", "--batch_size", "1"],
    ["baseline_eval", "--num_samples", "3", "--obj_weights", "1", "--obj_weights", ",,1"],
    ["mavis_bs", "--obj_weights", "1", "--beta", "2", "--Q", "2", "--batch_size", "1"],
    ["baseline_eval_KL", "--batch_size", "1"],
]
MEASURED = ("seconds",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world with 13 prompts, in float64."""
    from utils.config import load_config
    from utils.data import prompts_csv, write_prompts

    folder = tmp_path_factory.mktemp("sharding")
    make_toy(folder)
    config = load_config(folder / "toy.yaml", folder / "workspace")
    prompts = [f"\n\nHuman: w{i} w{(7 * i) % 40} w{i + 2}\n\nAssistant: " for i in range(13)]
    write_prompts(prompts_csv(config, config.dataset("toy"), "test"), prompts)
    return folder


def workspace(world, folder):
    """A script whose workspace shares the world's models and prompts."""
    folder.mkdir(parents=True)
    for name in ("base_model", "value_models", "datasets"):
        (folder / name).symlink_to(world / "workspace" / name)
    return Script(world, folder)


def common(script):
    return ["--config", str(script.toy / "toy.yaml"), "--workspace", str(script.workspace), "--dataset", "toy",
            "--device", "cpu"]  # fmt: skip


def stages(script, prompts=13):
    """Every stage that processes share: [script, arguments, ...]."""
    trees = str(script.workspace / "trees")
    collect = ["get_data_base", "0", str(prompts), *TREES, "--output_dir", trees, "--chunk", "2"]
    label = ["label_tree", trees, "all", "--chunk", "3"]
    steered = ["get_data_iter", "0", str(prompts), "low", *TREES, "--beta", "2", "--chunk", "4"]
    steered += ["--output_dir", str(script.workspace / "trees" / "steered")]
    more = ["--num_prompts", str(prompts)]
    return [[*s, *common(script)] for s in (collect, label, *([*e, *more] for e in EVALUATIONS), steered)]


@pytest.fixture(scope="module")
def alone(world):
    """What one process makes."""
    from utils.cli import run

    script = workspace(world, world / "alone")
    for name, *argv in stages(script):
        assert run(lambda name=name, argv=argv: __import__(name).main(argv)) == 0
    return outputs(script)


def outputs(script):
    """{file: bytes} of the trees and of the run folders, without what is measured."""
    found = {f"trees/{p.relative_to(script.workspace / 'trees')}": p.read_bytes()
             for p in (script.workspace / "trees").rglob("*") if p.is_file() and p.name != ".lock"}  # fmt: skip
    for folder in run_folders(script):
        name = folder.name[-8:]  # the run's identity
        rows = [{k: v for k, v in s.items() if k not in MEASURED} for s in read_samples(folder)]
        found[f"{name}/samples"] = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        header, *lines = [line.split(",") for line in (folder / "rewards.csv").read_text().splitlines()]
        kept = [i for i, column in enumerate(header) if column not in MEASURED]
        found[f"{name}/rewards"] = [[line[i] for i in kept] for line in (header, *lines)]
        files = {f.name for f in folder.iterdir()}
        assert files == {"args.yaml", "samples.jsonl", "rewards.csv", "summary.txt"}, "nothing is left of the sharing"
    return found


def collected(found):
    """Of `outputs`, the trees of the reference."""
    return {k: v for k, v in found.items() if k.startswith("trees/") and not k.startswith("trees/steered/")}


def launch(folder, world_size, commands, *, timeout=240):
    """Run commands, each by all processes, under `accelerate launch`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages.json").write_text(json.dumps(commands))
    call = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
            "--num_processes", str(world_size), str(ROOT / "tests/launched_stages.py"), str(folder)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(call, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)


def test_two_launched_processes_make_the_bytes_of_one(world, alone, tmp_path):
    script = workspace(world, tmp_path / "ws")
    done = launch(tmp_path / "launch", 2, stages(script))
    assert done.returncode == 0, done.stderr[-3000:]
    assert outputs(script) == alone and len(alone) == 2 * (13 + 2) + 2 * 6
    assert done.stdout.count("process 0 of 2: ") == 2 and done.stdout.count("means (and") == 2, "one process prints"


@pytest.mark.slow
def test_four_launched_processes_make_the_bytes_of_one(world, alone, tmp_path):
    script = workspace(world, tmp_path / "ws")
    done = launch(tmp_path / "launch", 4, stages(script))
    assert done.returncode == 0, done.stderr[-3000:]
    assert outputs(script) == alone


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_launch_with_one_line(world, tmp_path):
    """One that all have is said once; one that a single process has is said by it."""
    script = workspace(world, tmp_path / "ws")
    command = ["mavis", "--obj_weights", "0,0,1", "--beta", "2", *common(script)]
    done = launch(tmp_path / "launch", 2, [command])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and len(lines) == 1 and "length" in lines[0] and "process 0 of 2" in lines[0]

    collect = stages(script)[0][1:]
    (tmp_path / "one_fails.py").write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport get_data_base\nfrom utils import cli\n"
        f"first = os.environ['RANK'] == '0'\nmore = [] if first else ['--device', 'nonsense']\n"
        f"time.sleep(60 * first)\n"  # else it may do everything before the other one looks
        f"sys.exit(cli.run(lambda: get_data_base.main([*{collect!r}, *more])))\n"
    )
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*call, str(tmp_path / "one_fails.py")], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and len(lines) == 1, done.stderr[-3000:]
    assert "process 1 of 2" in lines[0] and "nonsense" in lines[0]


# ----------------------------------------------------------------------------------- interrupted, split by hand, joined


def as_process(monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def interrupt_after(monkeypatch, owner, name, count):
    """Let the function of a module raise a KeyboardInterrupt at its call number count + 1."""
    calls, original = [], getattr(owner, name)

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) > count:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def test_interrupted_processes_are_completed_by_any_number_of_others(world, alone, tmp_path, monkeypatch):
    """Process 1 of 2 ends in the middle, then 0 of 3, and one process alone does the rest."""
    import utils.hdf5_utils
    import utils.labelling

    script = workspace(world, tmp_path / "ws")
    collect, label, *_ = ([s[0], *s[1:]] for s in stages(script))
    trees = script.workspace / "trees"
    for name, owner, function in (
        (collect, utils.hdf5_utils, "write_structure"),
        (label, utils.labelling, "update_tree"),
    ):
        main = {"get_data_base": get_data_base, "label_tree": label_tree}[name[0]].main
        for rank, size, count in ((1, 2, 3), (0, 3, 2)):
            with monkeypatch.context() as m:
                as_process(m, rank, size)
                interrupt_after(m, owner, function, count)
                with pytest.raises(KeyboardInterrupt):
                    main(name[1:])
        with monkeypatch.context() as m:
            as_process(m, 2, 4)
            assert main(name[1:]) == 0  # another one that is not the first does the rest, and leaves the merging
        assert (trees / "claims").is_dir()
        assert main(name[1:]) == 0
        assert not (trees / "claims").exists() and not (trees / "parts").exists()
    assert outputs(script) == collected(alone)


def test_a_split_by_hand_makes_the_bytes_of_one(world, alone, tmp_path, monkeypatch):
    """Ranges that cut chunks, the later one first, one of them by two processes."""
    script = workspace(world, tmp_path / "ws")
    _, *argv = stages(script)[0]
    with monkeypatch.context() as m:
        for rank in (1, 0):
            as_process(m, rank, 2)
            assert get_data_base.main(["5", "8", *argv[2:]]) == 0
    assert get_data_base.main(["0", "5", *argv[2:], "--chunk", "64"]) == 0
    assert label_tree.main(stages(script)[1][1:]) == 0
    assert outputs(script) == collected(alone)


@pytest.mark.parametrize("number", range(len(EVALUATIONS)), ids=[e[0] for e in EVALUATIONS])
def test_an_evaluation_is_completed_by_any_number_of_processes(world, alone, tmp_path, monkeypatch, number):
    import utils.shared_evaluation

    script = workspace(world, tmp_path / "ws")
    (script.workspace / "trees").mkdir()
    name, *argv = stages(script)[2 + number]
    main = __import__(name).main
    with monkeypatch.context() as m:
        as_process(m, 0, 2)
        interrupt_after(m, utils.shared_evaluation, "write_atomically", 2)
        with pytest.raises(KeyboardInterrupt):
            main(argv)
    with monkeypatch.context() as m:
        as_process(m, 2, 3)
        interrupt_after(m, utils.shared_evaluation, "write_atomically", 1)
        with pytest.raises(KeyboardInterrupt):
            main(argv)
    next(script.workspace.glob("*/*/*/*/parts/0000000-*.jsonl")).unlink()  # as if the first part's process was killed
    copy = Script(world, tmp_path / "copy")
    shutil.copytree(script.workspace, copy.workspace, symlinks=True)
    with monkeypatch.context() as m:
        as_process(m, 1, 2)
        assert main(argv) == 0  # takes all that is left, and leaves the rest to the first
        assert not list(script.workspace.glob("*/*/*/*/summary.txt"))
        as_process(m, 0, 4)
        assert main(argv) == 0
    expected = {k: v for k, v in alone.items() if k in outputs(script)}
    assert len(expected) >= 2 and outputs(script) == expected
    swapped = [str(copy.workspace) if a == str(script.workspace) else a for a in argv]
    assert main(swapped) == 0  # one process, from the same remainders
    assert outputs(copy) == expected


def test_what_is_kept_of_probabilities_has_the_same_bits_in_any_batch():
    """In float64; unrounded, half of these log-ratios differ in their last bits."""
    from tests.models_for_tests import causal_lm
    from utils.answers import pick, sampler
    from utils.collection import rounded
    from utils.completions import LOG_RATIO_DECIMALS
    from utils.growth import TreeShape, grow_trees
    from utils.policies import ReferencePolicy

    prompts = {i: [3 + i % 7] * (2 + i % 5) + [i % 50 + 3] for i in range(6)}
    policy, part = ReferencePolicy(causal_lm("llama_grouped_tied"), top_k=8), [(i, 0) for i in range(6)]

    def trees(batch_size):
        shape, texts = TreeShape(3, 2, 3, 12), dict.fromkeys(prompts, "")
        grown = grow_trees(policy, prompts, texts, shape, seed=0, eos_token_id=None, batch_size=batch_size)
        return {t.prompt_index: rounded(t).log_ratio.tolist() for t in grown}

    def rows(batch_size):
        generate = sampler(policy, num_samples=1, max_new_tokens=12, eos_token_id=2, batch_size=batch_size)
        candidates = generate(list(prompts.values()), part)
        nothing = {"to_text": lambda ids: "", "score": lambda asked, texts: {}, "weights": {}, "extra": {}, "work": {}}
        how = {"seconds": 0.0, "track_kl": True, "read": None} | nothing
        kept = pick(part, candidates, dict.fromkeys(prompts, ""), prompts, **how)
        return kept, [c[0].log_ratio for c in candidates]

    assert trees(1) == trees(17)
    (one, exact), (many, _) = rows(1), rows(17)
    assert one == many and all("log_ratio" in row and "reference_log_prob" in row for row in one)
    assert [row["log_ratio"] for row in one] == [round(x, LOG_RATIO_DECIMALS) for x in exact] != exact


def test_complete_work_loads_nothing_and_is_not_repeated(world, tmp_path, monkeypatch, capsys):
    import utils.models

    script = workspace(world, tmp_path / "ws")
    (script.workspace / "trees").mkdir()
    command = stages(script)[3][1:]
    import baseline_eval

    assert baseline_eval.main(command) == 0
    before = outputs(script)
    monkeypatch.setattr(utils.models, "load_reference", lambda *a: pytest.fail("loaded"))
    for rank in (1, 0):
        as_process(monkeypatch, rank, 2)
        capsys.readouterr()
        assert baseline_eval.main(command) == 0
        assert capsys.readouterr().out.count("complete and is not repeated") == (0 if rank else 2)
    assert outputs(script) == before


@pytest.mark.parametrize(
    "argv, said",
    [
        (("mavis", "--obj_weights", "1", "--kl_budget", "1"), "--kl_budget is for one process"),
        (("mavis", "--obj_weights", "1", "--beta", "1", "--prompt", "w1"), "--prompt is for one process"),
        (("mavis", "--obj_weights", "1", "--beta", "1", "--rerun"), "--rerun is for one process"),
        (("label_tree", "somewhere", "all", "--relabel"), "--relabel is for one process"),
    ],
)
def test_what_one_process_must_do_is_refused_for_several(world, tmp_path, monkeypatch, capsys, argv, said):
    script = workspace(world, tmp_path / "ws")
    as_process(monkeypatch, 0, 2)
    assert status(script, *argv) == 2
    assert said in capsys.readouterr().err and not run_folders(script)


def test_who_waits_for_a_run_folder_that_nobody_makes_says_so(world, tmp_path):
    from utils.errors import DataError
    from utils.runs import RunSpec, join_run

    with pytest.raises(DataError, match="the first process has made no run folder in .* in 0.1 seconds"):
        join_run(tmp_path, RunSpec("mavis_logs", "toy", "mavis", ("low",)), patience=0.1)
