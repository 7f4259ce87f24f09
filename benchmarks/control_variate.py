"""Variance of the estimators over drawn sets, on recorded rollouts of the bundled tasks.

    python -m benchmarks.control_variate --out=docs/results/control_variate [--tasks=tiny,end_digit]

Recorded are, for held-out problems at T = 1, N search traces, and M aggregations of each of all
C(N, S) sets by the bundled model. So training's draw of K sets can be repeated with nothing else
changed. Measured is the mean over draws of the sum of squares of a problem's loss weights of search
("unbiased"): of a gradient whose traces' own gradients are orthogonal and of one length, it is
variance plus squared mean. The mean is the same for all of these estimators, which is checked
against scoring every set; so differences are differences of variance, and what scoring every set
leaves is the least possible at this N and M.

`set_control_variate` is measured for any c, as its weights are linear in it. The c that training
would use is fitted on one draw of half of the problems and used for the other half. What is there
in OUT.json is not recorded again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib.axes import Axes

from benchmarks.held_out import open_held_out
from benchmarks.machine import machine
from configs import end_digit, three_parts, tiny
from spiral_jax.evaluation.measures import BOOTSTRAP_DRAWS
from spiral_jax.evaluation.statistics import bootstrap_weights
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.control_variate import Slopes
from spiral_jax.objective.of_sets import every_subset
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.objective.weights import candidate_weights
from spiral_jax.reporting.axes import new_figure, set_note, set_title, tidy
from spiral_jax.reporting.style import BLUE, GREY, ORANGE, VERMILION

CONFIGS = {"tiny": tiny, "end_digit": end_digit, "three_parts": three_parts}
TITLES = {"tiny": "two halves", "end_digit": "end digit", "three_parts": "three parts"}
OURS, OTHERS = "set_control_variate", ("marginal_mean", "with_without")
_C = np.linspace(-0.5, 1.5, 21)

OUT = flags.DEFINE_string("out", "docs/results/control_variate", "the report, without its ending")
TASKS = flags.DEFINE_list("tasks", list(CONFIGS), f"of {', '.join(CONFIGS)}")
PROBLEMS = flags.DEFINE_integer("problems", 48, "held-out problems")
DRAWS = flags.DEFINE_integer("draws", 300, "draws of K sets of each problem")


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    file = out.with_suffix(".json")
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    report.setdefault("machine", machine())
    tasks = report.setdefault("tasks", {})
    for task in TASKS.value:
        if task not in tasks:
            tasks[task] = {"recorded": record(task)}
        tasks[task]["measured"] = measure(tasks[task]["recorded"], DRAWS.value)
        file.write_text(json.dumps(report) + "\n")
        print(task, json.dumps(tasks[task]["measured"], indent=1), flush=True)
    draw_figure(report, out.with_suffix(".png"))


def record(task: str) -> dict[str, Any]:
    """Own rewards [B, N] and mean rewards of every set [B, T], by the bundled model."""
    config = CONFIGS[task].get_config()
    with open_held_out(config, PROBLEMS.value, every_set=True) as held_out:
        searched = held_out.search()
        read = held_out.aggregate(searched.groups)
    stages = held_out.setup.training.stages
    reward_UxM = read.groups.reward_UxC
    return {
        "S": stages.subset_size,
        "K": stages.subsets,
        "M": reward_UxM.shape[1],
        "own": searched.groups.reward_UxC.tolist(),
        "score": reward_UxM.mean(axis=1).reshape(PROBLEMS.value, -1).tolist(),
    }


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What was recorded; a set's mean reward stands for its M aggregations."""

    own_BxN: np.ndarray
    score_BxT: np.ndarray
    S: int
    K: int

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Recorded:
        return cls(np.array(plain["own"]), np.array(plain["score"]), plain["S"], plain["K"])

    def rewards(self, drawn_BxK: np.ndarray) -> Rewards:
        """As if these of all sets had been drawn."""
        every_TxS = every_subset(self.own_BxN.shape[1], self.S)
        score_BxK = np.take_along_axis(self.score_BxT, drawn_BxK, axis=1)
        return Rewards(self.own_BxN, score_BxK[..., None], every_TxS[drawn_BxK])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.random(self.score_BxT.shape).argsort(axis=1)[:, : self.K]


def weights(estimator: str, rewards: Rewards, c: float = 0.0) -> np.ndarray:
    """The search traces' loss weights [B, N], each problem's as of a batch of one."""
    (advantages,) = compute_advantages(estimator, [rewards], (c,)).rounds
    settings = ObjectiveSettings(estimator, "unbiased", 1.0, 1.0, length_gate=0.0)
    length = np.ones(rewards.own_BxN.shape, int)
    weight_BxN = candidate_weights(settings, advantages.candidate_BxN, rewards, length)
    return weight_BxN.astype(np.float64) * len(weight_BxN)


def measure(plain: dict[str, Any], draws: int) -> dict[str, Any]:
    """Mean squares of weights, by estimator and by c; c as training fits it; intervals."""
    recorded, rng = Recorded.from_plain(plain), np.random.default_rng(0)
    B, T = recorded.score_BxT.shape
    every = weights("with_without", recorded.rewards(np.tile(np.arange(T), (B, 1))))
    drawn = [recorded.rewards(recorded.draw(rng)) for _ in range(draws)]
    weight_DxBxN = {name: np.stack([weights(name, r) for r in drawn]) for name in OTHERS}
    at_0 = np.stack([weights(OURS, r, 0.0) for r in drawn])
    slope = np.stack([weights(OURS, r, 1.0) for r in drawn]) - at_0

    c_B = np.empty(B)
    halves = np.array_split(np.arange(B), 2)
    for ours, theirs in zip(halves, halves[::-1], strict=True):
        c_B[ours] = fit(recorded, theirs, recorded.draw(rng))
    weight_DxBxN[OURS] = at_0 + c_B[:, None] * slope
    square_B = {name: (w**2).sum(axis=2).mean(axis=0) for name, w in weight_DxBxN.items()}
    by_c = [((at_0 + c * slope) ** 2).sum(axis=2).mean() for c in _C]
    return {
        "c as fitted on the other half": [c_B[half[0]] for half in halves],
        "c with the least": -(at_0 * slope).sum() / (slope**2).sum(),
        "mean square": {name: values.mean() for name, values in square_B.items()},
        "mean square, every set scored": (every**2).sum(axis=1).mean(),
        "mean square, over with_without": ratio(square_B[OURS], square_B["with_without"]),
        "mean square, over marginal_mean": ratio(square_B[OURS], square_B["marginal_mean"]),
        "largest deviation of a mean from every set's, in standard errors": {
            name: deviation(w, every) for name, w in weight_DxBxN.items()
        },
        "c": _C.tolist(),
        "mean square by c": by_c,
    }


def fit(recorded: Recorded, problems: np.ndarray, drawn_BxK: np.ndarray) -> float:
    """c after a step of these problems."""
    some = dataclasses.replace(
        recorded, own_BxN=recorded.own_BxN[problems], score_BxT=recorded.score_BxT[problems]
    )
    return Slopes.unknown(1).after([some.rewards(drawn_BxK[problems])]).c_R[0]


def ratio(ours_B: np.ndarray, theirs_B: np.ndarray) -> dict[str, float]:
    """Ratio of means with a 95 % bootstrap interval over problems."""
    weight_RxB = bootstrap_weights(0, len(ours_B), BOOTSTRAP_DRAWS)
    ratio_R = (weight_RxB @ ours_B) / (weight_RxB @ theirs_B)
    low, high = np.percentile(ratio_R, (2.5, 97.5))
    return {"ratio": ours_B.mean() / theirs_B.mean(), "low": low, "high": high}


def deviation(weight_DxBxN: np.ndarray, every_BxN: np.ndarray) -> float:
    error_BxN = weight_DxBxN.std(axis=0) / np.sqrt(len(weight_DxBxN))
    difference_BxN = np.abs(weight_DxBxN.mean(axis=0) - every_BxN)
    # what has no spread over draws is compared in units of float32's rounding
    return float((difference_BxN / np.maximum(error_BxN, 1e-6)).max())


def draw_figure(report: dict[str, Any], file: pathlib.Path) -> None:
    tasks = report["tasks"]
    figure = new_figure(4.2 * len(tasks), 3.6)
    all_axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, of_task) in zip(all_axes, tasks.items(), strict=True):
        draw_task(axes, TITLES[task], of_task["measured"])
    all_axes[0].set_ylabel("mean square of a problem's weights")
    all_axes[0].legend(fontsize=8)
    some = next(iter(tasks.values()))["recorded"]
    sizes = f"N = {len(some['own'][0])}, S = {some['S']}, K = {some['K']}, M = {some['M']}"
    set_note(figure, f"{len(some['own'])} held-out problems of each bundled model, {sizes}")
    figure.savefig(file)


def draw_task(axes: Axes, title: str, measured: dict[str, Any]) -> None:
    square = measured["mean square"]
    axes.plot(measured["c"], measured["mean square by c"], color=BLUE, label=OURS)
    lines = ((VERMILION, "--", OTHERS[0]), (ORANGE, "-.", OTHERS[1]))
    for color, dash, name in lines:
        axes.axhline(square[name], color=color, linestyle=dash, label=name)
    every = measured["mean square, every set scored"]
    axes.axhline(every, color=GREY, linestyle=":", label="every set scored")
    fitted = float(np.mean(measured["c as fitted on the other half"]))
    axes.plot([fitted], [square[OURS]], "o", color=BLUE, label="c as fitted")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("c")
    set_title(axes, title)
    tidy(axes)


if __name__ == "__main__":
    app.run(main)
