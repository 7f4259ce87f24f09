"""What each function of `model/layouts.py` is worth: the train step with it and without it.

    python -m benchmarks.layouts [--repeats=5] [--json=FILE]

The model, the groups and the step are those of `benchmarks.train_step`. Variants take turns, one
step each, so that a machine that slows down slows all of them. A layout that gains less than a
tenth of a step should go.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

from benchmarks.machine import commit, machine
from benchmarks.markdown import table_lines
from benchmarks.peers.spiral_step import SpiralStep
from benchmarks.sampler_cases import write_model
from benchmarks.train_step_cases import SHAPES, write_adapters
from spiral_jax.model import layouts

# Without it -> what takes its place. `token_rows` cannot go from adapters alone: their backward
# pass sums over rows.
FULL = {
    "token_rows": lambda x: x,
    "merged_leading_axes": lambda x: x,
}
ADAPTERS = {"merged_leading_axes": lambda x: x}


class Variant:
    """The train step without one layout; None: with all of them."""

    def __init__(self, without: str | None, instead: Callable | None):
        self.without, self.instead = without, instead
        self.step = SpiralStep()

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """While its step is traced, which the first call does."""
        if self.without is None:
            yield
        else:
            with mock.patch.object(layouts, self.without, self.instead):
                yield


def seconds_of_steps(
    model: pathlib.Path, adapters: pathlib.Path | None, work: pathlib.Path, repeats: int
) -> dict[str, float]:
    """Median seconds of a step, by what is left out."""
    table = ADAPTERS if adapters else FULL
    variants = [Variant(None, None), *(Variant(*row) for row in table.items())]
    for variant in variants:
        with variant.patched():
            variant.step.load(str(model), str(adapters) if adapters else None)
            variant.step.step(str(work), 1)
    seconds: dict[str, list[float]] = {str(variant.without): [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            seconds[str(variant.without)].append(variant.step.step(str(work), 1)["seconds"])
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    report = {"machine": machine(), "commit": commit(), "repeats": given.repeats, "seconds": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_model(folder / "model")
        write_adapters(folder / "adapters.npz")
        for shape_name, shape in SHAPES.items():
            work = folder / f"{shape_name}.npz"
            shape.work().save(work)
            for trained, adapters in (("all", None), ("adapters", folder / "adapters.npz")):
                measured = seconds_of_steps(folder / "model", adapters, work, given.repeats)
                report["seconds"][f"{shape_name}, {trained}"] = measured
                print(f"\n{shape_name}, trained: {trained}")
                rows = [
                    [without, f"{value:.3f}", f"{100 * (value / measured['None'] - 1):+.1f} %"]
                    for without, value in measured.items()
                ]
                print("\n".join(table_lines(["without", "seconds", "change"], rows)), flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
