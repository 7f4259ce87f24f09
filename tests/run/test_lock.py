"""One run in a directory at a time: who holds it, what a kill leaves, what other machines see."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import pytest

from spiral_jax.core import distributed
from spiral_jax.run import lock
from spiral_jax.run.lock import LockError, hold

HOLDER = """
import pathlib, sys, time
from spiral_jax.run import lock
with lock.hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def content(folder):
    return json.loads((folder / lock.FILE).read_text())


def write_foreign(folder, **changes):
    """A lock as another machine's process would leave it, whose pid also exists here."""
    start = lock._process_start(os.getpid())
    foreign = {"pid": os.getpid(), "host": "far", "since": "2026-01-01T00:00:00.0+00:00"}
    foreign |= {"process_start": start, "machine": "another"} | changes
    (folder / lock.FILE).write_text(json.dumps(foreign))
    return foreign


def test_a_directory_that_is_held_is_refused_to_others_and_free_afterwards(tmp_path):
    with hold(tmp_path):
        held = content(tmp_path)
        assert held["pid"] == os.getpid() and held["host"] == socket.gethostname()
        with pytest.raises(LockError) as refused, hold(tmp_path):
            pass
        for part in (str(os.getpid()), held["host"], held["since"][:19], str(tmp_path)):
            assert part in str(refused.value)
        assert content(tmp_path) == held
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cpu_bits("it runs in a process of its own, on CPUs")
def test_a_process_keeps_others_out_until_kill_9_and_its_lock_is_then_taken_over(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=f"process {process.pid} on "), hold(tmp_path):
            pass
        os.kill(process.pid, signal.SIGKILL)
        while lock._process_start(process.pid):  # nobody has waited for it: it is a zombie
            time.sleep(0.01)
        with hold(tmp_path):
            assert content(tmp_path)["pid"] == os.getpid()
    finally:
        process.kill()
        process.wait()


def test_a_lock_whose_pid_is_another_process_by_now_is_stale(tmp_path):
    write_foreign(tmp_path, host=socket.gethostname(), machine=lock._machine(), process_start="1")
    with hold(tmp_path):
        assert content(tmp_path)["process_start"] != "1"


def test_a_lock_of_another_machine_is_stale_once_it_is_silent(tmp_path):
    write_foreign(tmp_path)
    with hold(tmp_path, silent_s=0.2):
        assert content(tmp_path)["host"] == socket.gethostname()


def test_a_lock_of_another_machine_that_gives_signs_of_life_is_respected(tmp_path):
    foreign, ended = write_foreign(tmp_path), threading.Event()

    def live():
        while not ended.wait(0.02):
            os.utime(tmp_path / lock.FILE)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(LockError, match=r"on far.*delete .*lock\.json"), hold(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()
    assert content(tmp_path) == foreign


@pytest.mark.parametrize("text", ["", "{", "7"])
def test_a_lock_that_a_kill_has_left_unfinished_is_taken_over_too(tmp_path, text):
    (tmp_path / lock.FILE).write_text(text)
    with hold(tmp_path, silent_s=0.2):
        assert content(tmp_path)["pid"] == os.getpid()


def test_of_several_that_find_a_stale_lock_at_the_same_moment_one_gets_it(tmp_path):
    write_foreign(tmp_path)
    together, results = threading.Barrier(8), []

    def take():
        together.wait()
        try:
            results.append(lock._Lock(tmp_path / lock.FILE, silent_s=0.2).take())
        except LockError:
            results.append(None)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [result for result in results if result]
    assert len(results) == 8 and content(tmp_path) == winner


def wait_until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_whose_lock_another_has_taken_ends_and_leaves_it_alone(
    tmp_path, monkeypatch, capsys
):
    codes = []
    monkeypatch.setattr(lock.os, "_exit", codes.append)
    with hold(tmp_path, beat_s=0.02):
        foreign = write_foreign(tmp_path)
        wait_until(lambda: codes)
    assert codes[0] == 1 and "on far" in capsys.readouterr().err
    assert content(tmp_path) == foreign


def test_a_lock_that_was_deleted_by_hand_comes_back(tmp_path):
    with hold(tmp_path, beat_s=0.02):
        held = content(tmp_path)
        (tmp_path / lock.FILE).unlink()
        wait_until((tmp_path / lock.FILE).exists)
        time.sleep(0.1)
        assert content(tmp_path) == held
        before = (tmp_path / lock.FILE).stat().st_mtime_ns
        wait_until(lambda: (tmp_path / lock.FILE).stat().st_mtime_ns > before)  # signs of life


def test_another_process_of_the_same_run_is_included_and_waits_to_see_the_lock(
    tmp_path, monkeypatch
):
    of_first = write_foreign(tmp_path)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "from_first", lambda read: of_first)
    with hold(tmp_path):
        assert content(tmp_path) == of_first
    assert content(tmp_path) == of_first
    monkeypatch.setattr(lock, "_SHARED_WITHIN_S", 0.1)
    (tmp_path / lock.FILE).unlink()
    with pytest.raises(LockError, match="process 0.*does not see it.*share"), hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
