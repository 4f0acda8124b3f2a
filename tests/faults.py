"""Faults put to every stage that writes: killed, disk full, read-only, two at once; and a table of what became of them.

    python tests/faults.py --moments 20 --output docs/robustness_faults.md    # about an hour on one core
    python tests/faults.py --stages label_tree sft --moments 5

A stage runs in a child that is forked from a process which has imported everything, in a workspace at one and the same
path, with the clock standing still: then an undisturbed run and one that was disturbed and repeated must leave the same
bytes. What is left out of the comparison is in `comparable`.

A *write point* is an event below the workspace that Python's audit hooks see (a file opened for writing, a rename, a
removal, a new folder) or an fsync; the number of an undisturbed run's is counted first. At point n the process is
killed (at an fsync with half of the file's last line gone), or the disk is full from there on, or another process runs
the same command. `timed kill` waits for a share of the undisturbed run's seconds instead, so that it also hits what is
written outside Python.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), *(str(REPOSITORY / "Finetuning" / n) for n in ("", "PPO", "ARM", "SFT", "RM"))]

KILL, TIMED, FULL, TMPFS, READ_ONLY, TWICE = FAULTS = (
    "killed", "timed kill", "disk full", "small disk", "read-only", "two at once",
)  # fmt: skip
LIMIT = 120  # seconds that a child may take


# ------------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """A stage's command; `before` are commands that its workspace needs, `shared` says that two may run at once.

    {ws} in an argument is the workspace. `common` is off for a script without the shared arguments.
    """

    name: str
    module: str
    argv: str
    before: tuple[str, ...] = ()
    shared: bool = False
    common: bool = True
    config: str = "world"


ITER = "{ws}/tree_data/anthropic/iter_0"
STEER = "--dataset anthropic --num_prompts 3 --num_trials 2"
MAVIS = f"{STEER} --obj_weights 1 --value_model_iter 0"
PPO = "--exp_type assistant --batch_size 4 --mini_batch_size 4 --num_prompts 8 --max_steps 2 --ppo_epochs 1"
STAGES = {
    stage.name: stage
    for stage in (
        Stage("dataset_preprocess", "dataset_preprocess", "anthropic --split test", shared=True),
        Stage("get_data_base", "get_data_base", "0 5 --root_children 2", ("preprocess_train",), shared=True),
        Stage("get_data_iter", "get_data_iter", "0 3 help --beta 2", ("preprocess_train", "value_models"), shared=True),
        Stage("label_tree", "label_tree", f"{ITER} all", ("trees",), shared=True),
        Stage("label_tree --soft", "label_tree", f"{ITER} all --soft", ("trees",), shared=True),
        Stage("split_data", "split_data", ITER, ("labels",), shared=True),
        Stage("train_value_model", "train_value_model", "--objective help --num_epochs 2", ("split",)),
        Stage(
            "train_value_model, ridge", "train_value_model", "--objective help,harm --num_epochs 0 --head_start ridge",
            ("split",),
        ),
        Stage("fit_token_table", "fit_token_table", f"{ITER} all", ("labels",), shared=True),
        Stage(
            "fit_candidate_heads", "fit_candidate_heads", "help --num_prompts 10 --num_epochs 1 --rank 4",
            ("preprocess_train", "value_models"), shared=True,
        ),
        Stage("fit_judges", "fit_judges", "--dataset anthropic", config="rewards", shared=True),
        Stage("mavis", "mavis", f"{MAVIS} --beta 2", ("preprocess_test", "value_models")),
        Stage("mavis --kl_budget", "mavis", f"{MAVIS} --kl_budget 6", ("preprocess_test", "value_models")),
        Stage("mavis_bs", "mavis_bs", f"{MAVIS} --beta 2 --Q 2", ("preprocess_test", "value_models")),
        Stage("baseline_eval", "baseline_eval", STEER, ("preprocess_test",)),
        Stage(
            "baseline_eval, best of 4", "baseline_eval", f"{STEER} --num_samples 4 --obj_weights 0.5,0.5",
            ("preprocess_test",),
        ),
        Stage(
            "answers_eval", "answers_eval", f"{{ws}}/answers.jsonl --method_name mine {STEER}",
            ("preprocess_test", "answers"),
        ),
        Stage("pareto_report", "pareto_report", "{ws}/runs --output_dir {ws}/report", ("runs",), True, False),
        Stage("ppo", "ppo", f"{PPO} --alpha 0.5 --save_steps 1", ("preprocess_train",)),
        Stage(
            "train_arm", "train_arm", "--dataset anthropic --objective help --batch_size 8 --num_epochs 1 "
            "--num_prompts 8 --answers_per_prompt 4 --save_steps 1", ("preprocess_train",),
        ),
        Stage(
            "sft", "sft", "--exp_type assistant --max_steps 3 --num_samples 8 --batch_size 4 --save_steps 1 "
            "--logging_steps 1",
        ),
        Stage(
            "ppo, rloo", "ppo", "--exp_type assistant --algorithm rloo --alpha 0.5 --batch_size 8 --num_generations 4 "
            "--num_prompts 8 --max_steps 2 --ppo_epochs 1 --save_steps 1", ("preprocess_train",),
        ),
        Stage("merge_sft_lora", "merge_sft_lora", "--exp_type assistant", ("sft",)),
        Stage("reward_soup_merge", "reward_soup_merge", "--dataset anthropic --objectives help harm --weights 0.4 0.6",
              ("singles",)),
        Stage("train_reward_model, full", "train_reward_model", "--objective humor", config="rewards"),
        Stage("train_reward_model, linear", "train_reward_model", "--objective polite", config="rewards"),
    )
}  # fmt: skip


class World:
    """The tiny world in a folder of its own, workspaces as stages need them, and children that run stages."""

    def __init__(self, folder: Path, base: Path | None = None):
        self.folder, self.ws, self.templates = folder, folder / "work" / "ws", folder / "templates"
        self.templates.mkdir(parents=True)
        self.ws.parent.mkdir()
        self.configs = {name: self._configuration(name) for name in ("world", "rewards")}
        if base is None:
            base = self.templates / "base"
            status, said, _ = self.child(lambda: self._make_world(base))
            assert status == 0, said
        self._made = {(): base}

    def _make_world(self, folder: Path) -> int:
        from scripts.tiny.make_world import main

        return main(["--workspace", str(folder), "--steps", "20"])

    def _configuration(self, name: str) -> Path:
        """configs/tiny.yaml made smaller; `rewards` also trains reward models, whose data the others do without."""
        data = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
        data["workspace"] = str(self.ws)
        data["cpu_dtype"] = "float64"
        for spec in data["datasets"].values():
            spec["sft_model"] = "base_model"
            spec["objectives"] = [o for o in spec["objectives"] if o != "humor"]
            spec["num_val_prompts"] = 2
            spec["training"] |= {"batch_size": 16, "lr": 1e-3}
            spec["ppo"]["lora"]["r"] = spec["arm"]["lora"]["r"] = spec["sft"]["lora"]["r"] = 2
        data["value_model"]["lora"]["r"] = 2
        humor = data["objectives"].pop("humor")
        if name == "rewards":
            humor["training"] |= {"num_epochs": 1, "max_rows": 48, "max_holdout_rows": 16}
            source = {"files": ["world/anthropic/train.jsonl.gz"], "split": "train"}
            training = {"kind": "preference", "source": source | {"hash_range": [0.0, 0.5]}, "max_length": 64,
                        "holdout": source | {"hash_range": [0.5, 1.0]}, "max_rows": 32,
                        "max_holdout_rows": 16}  # fmt: skip
            polite = {"kind": "pooled", "path": "reward_models/polite", "text": "{prompt}{response}"}
            data["objectives"] |= {"humor": humor, "polite": polite | {"training": training}}
            data["datasets"]["anthropic"]["objectives"] += ["humor", "polite"]
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(data))
        return file

    # ------------------------------------------------------------------------------------------------ workspaces

    def command(self, stage: Stage) -> Callable[[], int]:
        argv = stage.argv.format(ws=self.ws).split()
        if stage.common:
            argv += ["--config", str(self.configs[stage.config]), "--device", "cpu"]
        return lambda: importlib.import_module(stage.module).main(argv)

    def place(self, template: Path) -> None:
        """Make the workspace anew from a template."""
        shutil.rmtree(self.ws, ignore_errors=True)
        shutil.copytree(template, self.ws)

    def template(self, before: tuple[str, ...]) -> Path:
        """A workspace in which the preparations `before` were made."""
        if before in self._made:
            return self._made[before]
        self.place(self.template(before[:-1]))
        for stage in self._preparation(before[-1]):
            if callable(stage):
                stage()
                continue
            status, said, _ = self.child(self.command(stage))
            assert status == 0, f"{stage.name}: {said}"
        self._made[before] = self.templates / "-".join(before)
        shutil.copytree(self.ws, self._made[before])
        return self._made[before]

    def _preparation(self, name: str) -> list:
        def preprocess(split):
            return Stage("", "dataset_preprocess", f"anthropic --split {split}")

        def copy_single():
            single = self.ws / "morlhf" / "anthropic" / "single"
            shutil.copytree(single / "help", single / "harm")

        trees = [preprocess("train"), Stage("", "get_data_base", "0 5 --root_children 2")]
        labels = [*trees, Stage("", "label_tree", f"{ITER} all")]
        return {
            "preprocess_train": [preprocess("train")],
            "preprocess_test": [preprocess("test")],
            "trees": trees,
            "labels": labels,
            "split": [*labels, Stage("", "split_data", ITER)],
            "value": [Stage("", "train_value_model", "--objective help --num_epochs 0 --head_start ridge")],
            "value_models": [self._copied_value_models],
            "sft": [Stage("", "sft", STAGES["sft"].argv)],
            "singles": [preprocess("train"), Stage("", "ppo", f"{PPO} --alpha 1"), copy_single],
            "answers": [self._make_answers],
            "runs": [preprocess("test"), self._make_runs],
        }[name]

    def _copied_value_models(self) -> None:
        """The value model of another workspace, since training one takes as long as all else."""
        here = self.ws.with_name("kept")
        self.ws.rename(here)
        made = self.template(("split", "value"))
        shutil.rmtree(self.ws, ignore_errors=True)
        here.rename(self.ws)
        shutil.copytree(made / "value_models", self.ws / "value_models")

    def _make_answers(self) -> None:
        rows = [{"index": i, "trial": t, "response": "." * t} for i in range(3) for t in range(2)]
        (self.ws / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _make_runs(self) -> None:
        for argv in (STEER, f"{STEER} --num_samples 2 --obj_weights 1", f"{STEER} --num_samples 2 --obj_weights 0,1"):
            status, said, _ = self.child(self.command(Stage("", "baseline_eval", argv)))
            assert status == 0, said
        (self.ws / "runs").mkdir()
        for name in ("baseline_logs", "baseline_bon_logs"):
            (self.ws / name).rename(self.ws / "runs" / name)

    # -------------------------------------------------------------------------------------------------- children

    def start(self, main: Callable[[], int], hook: Callable[[], None] | None = None) -> Child:
        """Fork a child that runs a script's main; its output goes into files."""
        return Child(self.folder, main, hook)

    def child(self, main: Callable[[], int], hook: Callable[[], None] | None = None) -> tuple[int, str, float]:
        """(status, standard error, seconds) of a child; a signal's status is negative."""
        return self.start(main, hook).wait()


class Child:
    """A forked process that runs a script's main as `python script.py` would."""

    def __init__(self, folder: Path, main: Callable[[], int], hook):
        self.error = Path(tempfile.mkstemp(dir=folder, suffix=".err")[1])
        self.began = time.perf_counter()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(main, hook)

    def _run(self, main, hook) -> None:
        status = 99
        try:
            descriptor = os.open(self.error, os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
            os.environ.pop("MAVIS_DEBUG", None)
            os.environ.pop("DATA_DIR", None)
            from utils.cli import quiet_libraries, run

            quiet_libraries()
            stand_still()
            if hook:
                hook()
            status = run(main)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds: float = LIMIT) -> tuple[int, str, float]:
        deadline = self.began + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"a child did not end within {seconds} s: {self.error.read_text()}")
            time.sleep(0.002)
        said = self.error.read_text()
        self.error.unlink()
        return os.waitstatus_to_exitcode(status), said, time.perf_counter() - self.began


def import_all() -> None:
    """Everything that a stage imports, before the first fork."""
    import torch

    torch.set_num_threads(1)
    for name in sorted({s.module for s in STAGES.values()} | {"scripts.tiny.make_world"}):
        importlib.import_module(name)
    for path in sorted((REPOSITORY / "utils").glob("*.py")):
        importlib.import_module(f"utils.{path.stem}")
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import trl
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer  # noqa: F401

    assert trl.SFTTrainer and trl.RewardTrainer


def stand_still() -> None:
    """Let the clock stand, so that no time is in what is written."""
    now = 1_700_000_000.0
    time.time = time.perf_counter = time.monotonic = lambda: now
    real = time.strftime
    time.strftime = lambda form, moment=None: real(form, time.gmtime(now) if moment is None else moment)


# ------------------------------------------------------------------------------------------------------- write points


class WritePoints:
    """Counts write points below a folder and calls `act(n, event, descriptor or None)` before the n-th (from 1)."""

    def __init__(self, folder: Path, act: Callable[[int, str, int | None], None]):
        self.folder, self.act, self.count, self.busy = str(folder), act, 0, False

    def __call__(self) -> None:
        real = os.fsync

        def fsync(descriptor):
            self._point("fsync", descriptor if isinstance(descriptor, int) else descriptor.fileno())
            real(descriptor)

        os.fsync = fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            path, writes = arguments[0], True
        else:
            return
        if writes and isinstance(path, (str, bytes, os.PathLike)):
            name = os.path.abspath(os.fsdecode(path)) if os.path.isabs(os.fsdecode(path)) else os.fsdecode(path)
            # What rmtree removes it names relative to an open folder.
            if name.startswith(self.folder) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(name)):
                self._point(event, None)

    def _point(self, event: str, descriptor: int | None) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            self.count += 1
            self.act(self.count, event, descriptor)
        finally:
            self.busy = False


def kill_at(n: int) -> Callable[[int, str, int | None], None]:
    """SIGKILL at a write point; at an fsync half of the file's last line is lost first, as if it was never written."""

    def act(count, event, descriptor):
        if count == n:
            if descriptor is not None:
                tear(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def tear(descriptor: int) -> None:
    """Cut half of a file's last line off."""
    path = f"/proc/self/fd/{descriptor}"
    data = Path(path).read_bytes()
    last = len(data) - (data.rstrip(b"\n").rfind(b"\n") + 1)
    with contextlib.suppress(OSError):  # opened for reading alone: it was written and flushed elsewhere
        os.truncate(descriptor, len(data) - last // 2)


FREEING = ("os.remove", "os.rmdir", "os.truncate")


def any_write_from(events: list[str], n: int) -> bool:
    """Whether anything at the write points from the n-th on takes room."""
    return any(event not in FREEING for event in events[n - 1 :])


def fail_from(n: int, code: int) -> Callable[[int, str, int | None], None]:
    """Every write from a point on fails, as on a disk that is full (where removing works) or read-only."""

    def act(count, event, descriptor):
        if count >= n and not (code == errno.ENOSPC and event in FREEING):
            raise OSError(code, os.strerror(code))

    return act


# ------------------------------------------------------------------------------------------------------------- checks


def comparable(folder: Path) -> dict[str, bytes]:
    """{file: its bytes}, without what must differ between a run and one that was disturbed and repeated:

    the process, the list of resumptions and the checkout's state in args.yaml, lock files (which are empty, or name a
    process), and the tenth place of what a model computed for a tree or an answer (float64): batches after a kill have
    other shapes.
    """
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if path.name == ".lock" or (path.name.startswith(".") and path.name.endswith(".lock")):
            continue
        if path.name == "args.yaml":
            record = yaml.safe_load(data)
            for key in ("process", "resumed", "commit"):
                record.pop(key, None)
            data = yaml.safe_dump(record).encode()
        elif path.name.endswith("_tree.json"):
            record = json.loads(data)
            record.pop("checksum", None)
            data = json.dumps(rounded(record)).encode()
        elif path.name == "samples.jsonl":
            data = "\n".join(sorted(json.dumps(rounded(json.loads(line))) for line in data.splitlines())).encode()
        elif path.name == "rewards.csv":
            head, *rows = csv.reader(data.decode().splitlines())
            data = json.dumps([head, *(rounded([float(x) for x in row]) for row in rows)]).encode()
        found[name] = data
    return found


def rounded(data):
    """Plain data with its floating-point numbers rounded to nine places."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [rounded(value) for value in data]
    return round(data, 9) if isinstance(data, float) else data


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    """In words, or "" where there are none."""
    parts = [f"missing {n}" for n in sorted(set(expected) - set(found))]
    parts += [f"left over {n}" for n in sorted(set(found) - set(expected))]
    parts += [f"different {n}" for n in sorted(set(found) & set(expected)) if found[n] != expected[n]]
    return "; ".join(parts[:6])


def one_line(said: str) -> bool:
    return said.count("\n") == 1 and said.startswith("error: ")


@dataclass
class Tally:
    """What became of a stage under one fault."""

    stage: str
    fault: str
    moments: int = 0
    failures: list[str] = None
    note: str = ""

    def add(self, moment, problem: str) -> None:
        self.moments += 1
        if problem:
            self.failures = [*(self.failures or []), f"{moment}: {problem}"]


class Trial:
    """A stage, its undisturbed result, and the faults put to it."""

    def __init__(self, world: World, stage: Stage, seed: int = 0):
        self.world, self.stage, self.main = world, stage, world.command(stage)
        self.before = world.template(stage.before)
        self.random = random.Random(f"{stage.name} {seed}")
        world.place(self.before)
        status, said, self.seconds = world.child(self.main)
        assert status == 0, f"{stage.name}: {said}"
        self.expected = comparable(world.ws)
        self.events = self._events()
        self.points = len(self.events)

    def _events(self) -> list[str]:
        """What happens at each write point of an undisturbed run."""
        self.world.place(self.before)
        file = self.world.folder / "points"

        def note(n: int, event: str, _) -> None:
            with file.open("a") as stream:
                stream.write(event + "\n")

        file.unlink(missing_ok=True)
        points = WritePoints(self.world.ws, note)
        status, said, _ = self.world.child(self.main, points)
        assert status == 0, f"{self.stage.name}: {said}"
        problem = differences(self.expected, comparable(self.world.ws))
        assert not problem, f"{self.stage.name} is not the same twice: {problem}"
        return file.read_text().split()

    def moments(self, count: int) -> list[int]:
        """Write points: all where there are few, else the last (where complete is told from incomplete) and others."""
        if count >= self.points:
            return list(range(1, self.points + 1))
        last = {self.points, self.points - 1} if count > 3 else {self.points}
        rest = [n for n in range(1, self.points + 1) if n not in last]
        return sorted(last | set(self.random.sample(rest, count - len(last))))

    def _completes(self) -> str:
        """The same command again, and what is wrong with its result."""
        status, said, _ = self.world.child(self.main)
        if status != 0:
            return f"the same command ends with {status}: {said.strip()[-400:]}"
        return differences(self.expected, comparable(self.world.ws))

    def run(self, fault: str, count: int) -> Tally:
        tally = Tally(self.stage.name, fault)
        {KILL: self._killed, TIMED: self._timed, FULL: self._full, TMPFS: self._small_disk,
         READ_ONLY: self._read_only, TWICE: self._twice}[fault](tally, count)  # fmt: skip
        return tally

    def _killed(self, tally: Tally, count: int) -> None:
        for n in self.moments(count):
            self.world.place(self.before)
            status, said, _ = self.world.child(self.main, WritePoints(self.world.ws, kill_at(n)))
            problem = "" if status == -signal.SIGKILL else f"status {status} instead of a kill: {said[-300:]}"
            tally.add(f"point {n} of {self.points}", problem or self._completes())

    def _timed(self, tally: Tally, count: int) -> None:
        for _ in range(count):
            self.world.place(self.before)
            share = self.random.random()
            child = self.world.start(self.main)
            time.sleep(share * self.seconds)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            tally.add(f"{share:.0%} of {self.seconds:.1f} s", self._completes())

    def _failing(self, status: int, said: str, *wanted: str) -> str:
        if status != 1 or not one_line(said):
            return f"status {status}: {said.strip()[-400:]}"
        return "" if any(w in said for w in wanted) else f"does not say {wanted}: {said}"

    def _full(self, tally: Tally, count: int) -> None:
        for n in self.moments(count):
            self.world.place(self.before)
            points = WritePoints(self.world.ws, fail_from(n, errno.ENOSPC))
            status, said, _ = self.world.child(self.main, points)
            problem = ""
            if status or any_write_from(self.events, n):
                problem = self._failing(status, said, "No space left on device") or half_written(self.world.ws)
            tally.add(f"point {n} of {self.points}", problem or self._completes())

    def _read_only(self, tally: Tally, count: int) -> None:
        self.world.place(self.before)
        before = comparable(self.world.ws)
        points = WritePoints(self.world.ws, fail_from(1, errno.EROFS))
        status, said, _ = self.world.child(self.main, points)
        problem = self._failing(status, said, "Read-only file system")
        tally.add("from the start", problem or differences(before, comparable(self.world.ws)))

    def _small_disk(self, tally: Tally, count: int) -> None:
        """A real file system of a few kilobytes more than the workspace before the stage."""
        place = self.world.ws.parent
        if subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True).returncode:
            tally.note = "mounting is not permitted"
            return
        try:
            self.world.place(self.before)
            used = used_bytes(place)
            status, said, _ = self.world.child(self.main)
            assert status == 0, said
            grown = used_bytes(place) - used
            for _ in range(count):
                self._resize(place, 1 << 30)
                self.world.place(self.before)
                share = self.random.random()
                self._resize(place, used_bytes(place) + max(4096, int(share * grown)))
                status, said, _ = self.world.child(self.main)
                problem = (
                    "" if status == 0 else self._failing(status, said, "o space left on device", "is the disk full?")
                )
                if not problem and status:
                    problem = half_written(self.world.ws)
                self._resize(place, 1 << 30)
                tally.add(f"{share:.0%} of {grown >> 10} KiB", problem or self._completes())
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def _resize(self, place: Path, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={-(-size // 4096) * 4}k", str(place)], check=True)

    def _twice(self, tally: Tally, count: int) -> None:
        """The first process waits at a write point until the second has ended, or for a second or two."""
        told = 0
        for n in self.moments(count):
            self.world.place(self.before)
            here, go = self.world.folder / "here", self.world.folder / "go"
            for flag in (here, go):
                flag.unlink(missing_ok=True)

            def act(at, *_, n=n, here=here, go=go):
                if at == n:
                    here.write_text("")
                    for _ in range(100):
                        if go.exists():
                            break
                        time.sleep(0.02)

            first = self.world.start(self.main, WritePoints(self.world.ws, act))
            while not here.exists():
                time.sleep(0.005)
            status, said, _ = self.world.child(self.main)
            go.write_text("")
            first_status, first_said, _ = first.wait()
            problem = "" if first_status == 0 else f"the first ends with {first_status}: {first_said.strip()[-300:]}"
            if first_status == 1 and one_line(first_said) and "is being written by" in first_said and status == 0:
                problem, told = "", told + 1  # it was stopped before it held the folder
            elif not problem and status == 1 and one_line(said) and "is being written by" in said:
                told += 1
            elif not problem and status:
                problem = f"the second ends with {status}: {said.strip()[-300:]}"
            problem = problem or differences(self.expected, comparable(self.world.ws))
            tally.add(f"point {n} of {self.points}", problem or self._completes())
        tally.note = f"one was told who writes {told} times; else both completed it"


def used_bytes(place: Path) -> int:
    info = os.statvfs(place)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def half_written(folder: Path) -> str:
    """Temporary files that an error, unlike a kill, must not leave."""
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*.tmp")]
    return f"left {', '.join(left)}" if left else ""


# ----------------------------------------------------------------------------------------------------------- the table


def table(tallies: list[Tally]) -> str:
    lines = ["| stage | fault | moments | outcome |", "| --- | --- | --- | --- |"]
    for t in tallies:
        good = t.moments - len(t.failures or [])
        outcome = f"{good} of {t.moments} as they must be" + (f"; {t.note}" if t.note and t.moments else "")
        lines.append(f"| {t.stage} | {t.fault} | {t.moments} | {outcome if t.moments else t.note} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="of each fault in each stage (default: 20)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--base", type=Path, help="a workspace of scripts/tiny/make_world.py (default: made here)")
    parser.add_argument("--output", type=Path, help="file of the table (default: printed alone)")
    args = parser.parse_args(argv)
    import_all()
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), args.base)
        for name in args.stages:
            began = time.perf_counter()
            try:
                trial = Trial(world, STAGES[name], args.seed)
            except AssertionError as error:
                print(f"{name}: FAILED undisturbed: {error}", flush=True)
                tallies.append(Tally(name, "none", 1, [str(error)]))
                continue
            for fault in args.faults:
                tally = trial.run(fault, args.moments)
                tallies.append(tally)
                for failure in tally.failures or []:
                    print(f"{name}, {fault}, {failure}", flush=True)
            print(f"{name}: {trial.points} write points, {time.perf_counter() - began:.0f} s", flush=True)
    text = table(tallies)
    print(text)
    if args.output:
        args.output.write_text(text)
    print(json.dumps({"moments": sum(t.moments for t in tallies),
                      "failures": sum(len(t.failures or []) for t in tallies)}))  # fmt: skip
    return int(any(t.failures for t in tallies))


if __name__ == "__main__":
    raise SystemExit(main())
