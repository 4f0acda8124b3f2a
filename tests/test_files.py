"""Files and folders that are whole or not there, and one process at a time in a folder."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from utils.config import REPOSITORY
from utils.errors import DataError
from utils.files import clear, hold, let_go, lets_go, put_in_place, temporary_name, whole_folder, write_atomically


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_what_a_killed_writer_left_is_used_up(tmp_path):
    temporary_name(tmp_path / "a.txt").write_text("half of something longer than what comes")
    write_atomically(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_write_that_fails_names_its_file_and_leaves_the_old_one(tmp_path, monkeypatch, where):
    write_atomically(tmp_path / "a.txt", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="No space") as error:
        write_atomically(tmp_path / "a.txt", "new")
    assert error.value.filename == str(tmp_path / "a.txt")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def _write_often(path, text, start):
    start.wait()
    for _ in range(200):
        write_atomically(path, text)


def test_many_processes_that_write_one_file_leave_one_of_their_texts(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    texts = [letter * 40_000 for letter in "abc"]
    writers = [context.Process(target=_write_often, args=(tmp_path / "deep" / "a.txt", t, start)) for t in texts]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        if (tmp_path / "deep" / "a.txt").exists():
            assert (tmp_path / "deep" / "a.txt").read_text() in texts  # whole at any moment
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert names(tmp_path) == ["deep", "deep/a.txt"]


def test_a_folder_appears_whole_or_not_at_all_and_the_old_one_stays_until_then(tmp_path):
    folder = tmp_path / "model"
    with whole_folder(folder) as part:
        (part / "a").write_text("1")
        assert not folder.exists()
    with pytest.raises(RuntimeError), whole_folder(folder) as part:
        (part / "b").write_text("2")
        raise RuntimeError
    assert names(tmp_path) == ["model", "model/a"]
    with whole_folder(folder) as part:
        (part / "c").write_text("3")
    assert names(tmp_path) == ["model", "model/c"]


def test_what_a_kill_leaves_beside_a_folder_goes_but_not_the_only_copy(tmp_path):
    folder, part, replaced = tmp_path / "model", tmp_path / ".model.tmp", tmp_path / "model.replaced"
    for place in (part, replaced):
        place.mkdir()
        (place / "a").write_text("1")
    clear(folder)
    assert names(tmp_path) == ["model.replaced", "model.replaced/a"]
    part.mkdir()
    put_in_place(part, folder)
    assert names(tmp_path) == ["model"]


HOLDER = """
import sys, time
from pathlib import Path
from utils.files import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_a_folder_until_the_first_ends_however_it_ends(tmp_path):
    folder = tmp_path / "out" / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(DataError, match=rf"model is being written by process {process.pid} on .*\(-c "):
        hold(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while True:  # the system gives a killed process's locks back in its own time
        try:
            hold(folder)
            break
        except DataError:
            assert time.monotonic() < deadline
    hold(folder)  # one's own again
    assert json.loads((tmp_path / "out" / ".model.lock").read_text())["pid"] == os.getpid()
    let_go()
    assert names(tmp_path) == ["out"]


def test_a_main_lets_its_folders_go_however_it_ends(tmp_path):
    @lets_go
    def main(fail):
        hold(tmp_path / "model")
        assert (tmp_path / ".model.lock").exists()
        if fail:
            raise DataError("no")
        return 0

    assert main(False) == 0 and names(tmp_path) == []
    with pytest.raises(DataError, match="no"):
        main(True)
    assert names(tmp_path) == []
