"""Does our sampler decode a real model as transformers does? SmolLM2 on GSM8K questions, greedy.

    python -m benchmarks.smollm2_greedy --hf_path=models/SmolLM2-135M-Instruct
        --questions=test.jsonl --json=FILE

Both in float32 on the CPU, transformers after us, each question alone there and all as one batch
here. A difference is reported with the gap between the two best logits of transformers at the first
other token: below 1e-4 it is a tie.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import NamedTuple

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.machine import machine
from configs import smollm2_135m
from spiral_jax.core.groups import GroupRequests, Role, pad_rows
from spiral_jax.learner.state import variables
from spiral_jax.prompts import prompts
from spiral_jax.run.setup import Setup, set_up_training
from spiral_jax.sampling.protocol import sample

HF_PATH = flags.DEFINE_string("hf_path", "models/SmolLM2-135M-Instruct", "model directory")
QUESTIONS = flags.DEFINE_string("questions", None, 'JSONL of {"question", "answer"}', required=True)
COUNT = flags.DEFINE_integer("count", 20, "questions, from the first", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 192, "limit of an answer", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "file that gets the report")

TIE = 1e-4


def main(argv: list[str]) -> None:
    setup = set_up_training(configuration())
    problems = [setup.task.held_out(i) for i in range(COUNT.value)]
    rows = [prompts.search_prompt(setup.scaffold, problem.text) for problem in problems]
    start = time.monotonic()
    ours = decode_here(setup, rows)
    middle = time.monotonic()
    theirs = decode_in_transformers(rows)
    end = time.monotonic()
    answers = [compare(*pair) for pair in zip(ours, theirs, strict=True)]
    report = {
        "machine": machine(),
        "questions": len(rows),
        "max_tokens": MAX_TOKENS.value,
        "equal": sum(answer["equal"] for answer in answers),
        "ties": sum(answer["tie"] for answer in answers),
        "tokens": sum(answer["tokens"] for answer in answers),
        "seconds": middle - start,
        "transformers_seconds": end - middle,
        "rows": answers,
    }
    print(
        f"{report['equal']} of {len(rows)} equal, {report['ties']} part at a tie, "
        f"{report['tokens']} tokens; {report['seconds']:.0f} s here with compilation, "
        f"{report['transformers_seconds']:.0f} s in transformers",
        flush=True,
    )
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n")


def configuration() -> ConfigDict:
    c = smollm2_135m.get_config()
    c.model.hf_path, c.model.lora_rank = HF_PATH.value, 0
    c.task.train_path = c.task.eval_path = QUESTIONS.value
    c.eval.search_temperature = 0
    c.sampling.rows = COUNT.value
    c.search.max_tokens = MAX_TOKENS.value
    # nothing is trained: micro-batches need only be wide enough to be allowed
    c.batch.search_lengths = ((c.prompt.max_problem_tokens, MAX_TOKENS.value),)
    c.loss.estimator = "grpo"
    return c


def decode_here(setup: Setup, rows: list[np.ndarray]) -> list[list[int]]:
    """Greedy ids of each prompt, the stop id included."""
    weights = setup.eval_sampler.prepare(variables(setup.model, None, setup.start.load_base()))
    prompt_UxP, prompt_len_U = pad_rows(rows)
    id_Ux6 = np.array([[0, 0, u, 0, Role.SEARCH, 0] for u in range(len(rows))], np.int32)
    requests = GroupRequests(prompt_UxP, prompt_len_U, id_Ux6, 1, MAX_TOKENS.value)
    groups = sample(setup.eval_sampler, weights, requests)
    return [groups.trace_ids(u, 0).tolist() for u in range(len(rows))]


class Reference(NamedTuple):
    """What transformers answers.

    Attributes:
      ids: greedy, the stop id included.
      gaps: between the two best logits at each of them.
    """

    ids: list[int]
    gaps: list[float]


def decode_in_transformers(rows: list[np.ndarray]) -> list[Reference]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(HF_PATH.value, dtype=torch.float32).eval()
    references = []
    for row in rows:
        out = model.generate(
            torch.tensor(row, dtype=torch.long)[None],
            do_sample=False,
            max_new_tokens=MAX_TOKENS.value,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].topk(2).values for logits in out.logits]
        gaps = [float(first - second) for first, second in best]
        references.append(Reference(out.sequences[0, len(row) :].tolist(), gaps))
    return references


def compare(ours: list[int], theirs: Reference) -> dict:
    """Where two answers part: `at` is the place of the first other token, with its `gap`."""
    tokens = len(theirs.ids)
    if ours == theirs.ids:
        return {"equal": True, "tie": False, "tokens": tokens, "smallest_gap": min(theirs.gaps)}
    different = (i for i, (a, b) in enumerate(zip(ours, theirs.ids, strict=False)) if a != b)
    at = next(different, min(len(ours), tokens))
    gap = theirs.gaps[at] if at < len(theirs.gaps) else None
    is_tie = gap is not None and gap <= TIE
    return {"equal": False, "tie": is_tie, "tokens": tokens, "at": at, "gap": gap}


if __name__ == "__main__":
    app.run(main)
