"""Waits end, and say for what; a step that takes far too long shows where it stands."""

import subprocess
import sys
import textwrap

from spiral_jax.run.watchdog import HUNG


def run(code):
    """A process of its own, which the code may end."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_a_passed_deadline_ends_the_process_with_its_reason_and_the_stacks():
    code, err = run(
        """
        import time
        from spiral_jax.run.watchdog import deadline
        def the_file_system():
            time.sleep(60)
        with deadline("the weights of /models/x to be read", 0.2):
            the_file_system()
        """
    )
    assert code == HUNG
    assert "the weights of /models/x to be read" in err and "the_file_system" in err


def test_a_deadline_that_is_kept_leaves_nothing_behind():
    code, err = run(
        """
        import time
        from spiral_jax.run.watchdog import deadline
        with deadline("nothing", 0.2):
            pass
        try:
            with deadline("an error", 0.2):
                raise KeyError
        except KeyError:
            time.sleep(0.5)
        """
    )
    assert (code, err) == (0, "")


def test_a_step_of_many_medians_has_all_stacks_printed_and_goes_on():
    code, err = run(
        """
        import time
        from spiral_jax.run.watchdog import Watchdog
        def slow_step():
            time.sleep(1.0)
        with Watchdog(5.0, unknown_s=60.0, least_s=0.1) as watchdog:
            for step in range(6):
                watchdog.begin("step", step)
                # The first compiles: it is no finding, and does not count.
                slow_step() if step in (0, 5) else time.sleep(0.01)
                watchdog.end()
        print("done", file=__import__("sys").stderr)
        """
    )
    assert code == 0 and err.endswith("done\n")
    assert err.count("watchdog: step 5") == err.count("watchdog:") == 1
    assert "slow_step" in err


def test_an_evaluation_without_a_median_has_its_stacks_printed_after_the_time_for_waits():
    code, err = run(
        """
        import time
        from spiral_jax.run.watchdog import Watchdog
        def hangs():
            time.sleep(1.0)
        with Watchdog(5.0, unknown_s=0.2, least_s=0.0) as watchdog:
            for step in range(4):  # their median is none of evaluations
                watchdog.begin("step", step)
                watchdog.end()
            watchdog.begin("evaluation", 4)
            hangs()
            watchdog.end()
        """
    )
    assert code == 0 and err.count("watchdog:") == 1
    assert "watchdog: evaluation 4" in err and "no median yet" in err and "hangs" in err


def test_a_watchdog_that_is_off_is_silent():
    code, err = run(
        """
        import time
        from spiral_jax.run.watchdog import Watchdog
        with Watchdog(0.0, unknown_s=0.0, least_s=0.0) as watchdog:
            for step in range(6):
                watchdog.begin("step", step)
                time.sleep(0.05)
                watchdog.end()
        """
    )
    assert (code, err) == (0, "")
