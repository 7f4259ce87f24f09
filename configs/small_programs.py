"""Code with tests: SmolLM2-135M-Instruct on forty small programming problems, reward "code".

    bash launch/fetch_smollm2.sh
    python -m spiral_jax.train --config=configs/small_programs.py --workdir=runs/programs

Everything is there without a network. A model of this size writes few programs that pass a test;
the config shows what a run on code needs: prompts that show candidates whole, limits that hold a
program, and time for its tests. For problems of your own set task.name to "jsonl", "parquet" or
"hf" and task.reward to "code"; `spiral_jax/verifier/programs.py` says in which columns tests are.
"""

from ml_collections import ConfigDict

from spiral_jax.core.config import defaults

SEARCH = "{problem}\n"
AGGREGATION = (
    "{problem}\n"
    "Here are attempts of others. Some may be wrong. Find out what is right in them, and write "
    "one program that is correct.\n"
    "{candidates}"
)


def get_config() -> ConfigDict:
    c = defaults()
    c.model.hf_path = "models/SmolLM2-135M-Instruct"  # as launch/fetch_smollm2.sh makes it
    c.model.param_dtype = "float32"
    c.model.compute_dtype = "float32"
    c.model.lora_rank = 16
    c.model.lora_alpha = 16.0

    c.task.name = "small_programs"
    c.task.reward = "code"  # the task's own; named, so that exported scaffolds know of the fences
    c.prompt.search, c.prompt.aggregation = SEARCH, AGGREGATION
    c.prompt.candidate = "Attempt {index}:\n{candidate}\n"
    c.prompt.max_problem_tokens = 192
    c.prompt.keep_tail_tokens = 160

    c.search.traces = 8
    c.search.max_tokens = 160
    c.aggregation.subsets = 4
    c.aggregation.subset_size = 3
    c.aggregation.traces = 2
    c.aggregation.max_tokens = 160
    c.batch.problems = 4

    c.verifier.timeout_s = 10.0  # of all tests of an answer together
    c.optimizer.lr = 1e-4
    c.train.steps = 100
    c.eval.problems = 8
    c.eval.subsets = 2
    c.checkpoint.every = 20
    return c
