"""SIGTERM and Ctrl-C: what lasts is finished, all else left at once; the grace has an end."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from spiral_jax.run.preemption import Preemption, exit_code
from spiral_jax.run.watchdog import HUNG


def notice():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_a_notice_ends_interruptible_work_where_it_is():
    done = []
    with Preemption(grace_s=60) as preemption:
        assert not preemption.reached()
        with preemption.interruptible():
            try:
                done.append("begun")
                notice()
                done.append("ended")
            except Exception:  # what handles failures on the way must not see it
                done.append("failed")
        assert done == ["begun"] and preemption.notice and preemption.reached()


def test_work_that_looks_up_after_a_notice_ends_there():
    done = []
    with Preemption(grace_s=60) as preemption:
        with preemption.interruptible():
            preemption.look()
            done.append("no notice yet")
        notice()
        with preemption.interruptible():
            done.append("begun")
            preemption.look()
            done.append("ended")
    assert done == ["no notice yet", "begun"]


def test_a_notice_outside_waits_for_the_next_look():
    with Preemption(grace_s=60) as preemption:
        with preemption.interruptible():
            pass
        notice()
        finished = True  # a save, say: not interrupted
        assert finished and preemption.reached()


def test_errors_of_the_work_come_through_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(grace_s=60) as preemption:
        with pytest.raises(KeyError), preemption.interruptible():
            {}["x"]
        assert not preemption.notice and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")
def test_a_save_that_outlasts_the_grace_ends_the_process():
    code = """
        import os, signal, time
        from spiral_jax.run.preemption import Preemption
        with Preemption(grace_s=0.3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == HUNG
    assert "preemption notice" in done.stderr and "config.train.grace_s" in done.stderr


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def test_a_ctrl_c_is_a_notice_too_and_says_so(capfd):
    before = signal.getsignal(signal.SIGINT)
    done = []
    with Preemption(grace_s=60) as preemption:
        with preemption.interruptible():
            done.append("begun")
            interrupt()
            done.append("ended")
        assert done == ["begun"] and preemption.notice is signal.SIGINT
        assert preemption.word == "interrupted"
        notice()  # a launcher's, after it: still the one Ctrl-C
        assert preemption.notice is signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before
    assert capfd.readouterr().err.count("interrupted") == 1
    assert exit_code(signal.SIGINT, preempted=0) == 130
    assert exit_code(signal.SIGTERM, preempted=143) == 143


@pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")
def test_a_second_ctrl_c_ends_the_process_even_where_no_python_runs():
    code = """
        import hashlib
        from spiral_jax.run.preemption import Preemption
        with Preemption(grace_s=600):
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)  # C: handlers wait
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "interrupted" in process.stderr.readline() and process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.stdout.close()
    process.stderr.close()
