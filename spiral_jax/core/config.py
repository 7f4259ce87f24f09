"""The configuration: every field with its unit and its default.

Fields marked (paper) have the value of arXiv 2606.23595, Table 1 and section 3.2; where the paper
is silent the value is ours. A file in `configs/` starts from `defaults()` and sets what differs;
the result is locked, so a misspelt field is an error that names the nearest one. What values a
field may have is checked by the room that reads it, and in `run/checks.py`.
"""

from __future__ import annotations

import hashlib
import json

from ml_collections import ConfigDict

from spiral_jax.core.errors import UserError

METRIC_WRITERS = ("tensorboard", "wandb", "trackio")
REMAT = ("none", "dots", "attention", "layer")  # ascending in what is computed twice
MEASURES = ("single", "pass_at_n", "majority", "aggregated")  # of an evaluation


class ConfigError(UserError):
    """A configuration that cannot run: names field, value, what is allowed and what to do."""


def require(ok: bool, field: str, value: object, allowed: str, advice: str = "") -> None:
    """Checks a field.

    Raises:
      ConfigError: not `ok`; it says that config.`field` must be `allowed`, and `advice`.
    """
    if not ok:
        raise ConfigError(
            f"config.{field} = {value!r}: must be {allowed}." + (f" {advice}" if advice else "")
        )


def require_whole(c: ConfigDict) -> None:
    """Checks that all fields of `defaults` are there.

    Raises:
      ConfigError: one is missing, or None.
    """
    if missing := _first_missing(defaults(), c):
        raise ConfigError(
            f"config.{missing} is missing, or None. Start from core.config's defaults() and leave "
            "what you do not need as it is."
        )


def _first_missing(whole: ConfigDict, c: ConfigDict) -> str:
    """The first field of `whole` that `c` has not, or has as None; "": it has all."""
    for name, default in whole.items():
        given = c.get(name)
        if given is None:
            return name
        if isinstance(default, ConfigDict) and (inner := _first_missing(default, given)):
            return f"{name}.{inner}"
    return ""


def defaults() -> ConfigDict:
    """Every field, at the paper's value or ours. Locked."""
    c = ConfigDict()
    c.seed = 0  # all randomness of a run: data order, subsets, candidate order, sampling

    c.model = ConfigDict()
    # a Hugging Face directory or Hub id of a family of docs/models.md; "bundled:tiny" is ours
    c.model.hf_path = ""
    # PEFT LoRA directory that a new run starts from; "" = a fresh adapter
    c.model.adapter_path = ""
    # WORKDIR@step of another run: its trained weights of that step are what a new run starts from
    c.model.init_from = ""
    # of a frozen base, "float32", "bfloat16" or "int8"; what is trained is always float32. "int8":
    # the projections' matrices, with a scale for each output channel; one device then holds one
    # copy of them, which sampler and trainer both read
    c.model.param_dtype = "bfloat16"
    # of activations and caches; norms, rope and softmax are float32
    c.model.compute_dtype = "bfloat16"
    # adapters on all seven projections; 0 = full fine-tuning (paper)
    c.model.lora_rank = 32
    c.model.lora_alpha = 32.0  # adapter output is scaled by alpha / rank (unpublished)
    # in a mixture of experts each projection of each expert has an adapter of its own; False: those
    # of attention alone
    c.model.lora_experts = False
    # What the backward pass keeps of each layer, computing the rest once more: "layer": its input;
    # "attention": and the results of attention and of adapters' first products, which are narrow;
    # "dots": and those of all products with weights; "none": everything is kept
    c.model.remat = "layer"
    # what computes attention in training and prefill: "xla", loops over blocks; "gpu", cuDNN;
    # "tpu", Pallas kernels, which have not run on a TPU yet; "auto", cuDNN where the devices and
    # the dtype allow it, else "xla"
    c.model.attention = "auto"
    # xla: queries, and keys, a block: scores in memory are [.., block, block]
    c.model.attention_block = 256

    c.mesh = ConfigDict()  # devices along each axis; one of them may be -1 = all the rest
    c.mesh.data = -1  # groups
    c.mesh.fsdp = 1  # groups, and slices of every weight and optimizer state
    c.mesh.tensor = 1  # heads and feed-forward columns

    c.task = ConfigDict()
    # a row of tasks/load.py; or your "package.module:function", a function (task.seed,
    # **task.generator_args) -> spiral_jax.library.Task
    c.task.name = "jsonl"
    # jsonl: file of {"problem" or "question", "answer"}, GSM8K's `#### 42` is understood; parquet:
    # verl's layout; all other columns reach a reward of yours as problem.metadata
    c.task.train_path = ""
    c.task.eval_path = ""  # jsonl, parquet: held-out file, same layout
    c.task.dataset = ""  # hf: name on the Hugging Face Hub, or a local directory of data files
    c.task.subset = ""  # hf: configuration of the data set; "" = its only one
    c.task.split_train = "train"  # hf: split to train on, such as "train" or "train[:1000]"
    c.task.split_eval = "test"  # hf: held-out split
    c.task.problem_column = "problem"  # hf: column of the problem's text
    # hf: column of its reference answer; "" = the reward needs none
    c.task.answer_column = "answer"
    c.task.generator = ""  # reasoning_gym: generator's name, e.g. "chain_sum"
    # reasoning_gym: the generator's own settings, such as {"max_numbers": 4}; {} = its defaults
    c.task.generator_args = ConfigDict()
    c.task.environment = ""  # verifiers: id of an installed taskset
    # verifiers: the taskset's own settings for training problems, such as {"split": "train"}, and
    # "select", {"skip", "limit", "shuffle", ...}; {} = no training problems
    c.task.environment_args = ConfigDict()
    c.task.environment_eval_args = ConfigDict()  # verifiers: the same for held-out problems
    c.task.seed = 0  # procedural tasks: which problems; train and held-out never share one
    # "" = the task's own, which of parquet is that of each data_source; "math" (0/1 on the last
    # \\boxed{}); "code", the share of its problem's tests that the last fenced block of Python
    # passes, or "code_all", whether it passes all (verifier/programs.py says in which columns tests
    # are); "instructions", the share of IFEval's instructions that are followed; your
    # "package.module:function", a function (text, problem) -> True, False, a number in [0, 1], None
    # = unparsed, or a pair of one of these and the answer as a string
    c.task.reward = ""
    # the same by the problem's column data_source, such as {"gsm8k": "math", "code": "my:run"};
    # task.reward judges all other sources; where it is empty, those of public sets have theirs from
    # a table (verifier/choice.py). Around names with a dot there must be
    # ConfigDict({...}, allow_dotted_keys=True)
    c.task.rewards = ConfigDict(allow_dotted_keys=True)
    # a trace's strategy, which polychromic rewards and evaluations report: "" = the task's own, if
    # it has one; your "package.module:function", a function (text, problem) -> anything hashable,
    # None = none (the paper asks a language model)
    c.task.strategy = ""

    c.prompt = ConfigDict()
    # "chat": a user's turn in the tokenizer's chat template; "plain", for base models without one:
    # the texts below as they are, behind the BOS token if the tokenizer begins texts with it
    c.prompt.template = "chat"
    # system message before the user's turn; "" = none but what the chat template adds
    c.prompt.system = ""
    # variables of the chat template, such as {"enable_thinking": False}; {} = its own defaults
    c.prompt.template_kwargs = ConfigDict()
    # tokens that end a trace beside those of generation_config.json and the tokenizer: each a text
    # or id, such as ("<|eot_id|>", 151643)
    c.prompt.stop = ()
    # asks for a search trace; {problem} is the task's text (the paper's wording is
    # unpublished)
    c.prompt.search = (
        "{problem}\n\nReason step by step, and put your final answer within \\boxed{{}}."
    )
    # asks for an aggregation trace; {candidates} are those below one after the other, {count} their
    # number
    c.prompt.aggregation = (
        "{problem}\n\nBelow are {count} independent attempts at this problem. Any number of them "
        "may be wrong.\n\n{candidates}\n\nFirst audit every attempt: name its errors. Then verify "
        "which parts can be used. Finally synthesise one complete and consistent solution, and put "
        "its final answer within \\boxed{{}}."
    )
    # repeated for each candidate, in aggregation.order
    c.prompt.candidate = "Attempt {index}:\n{candidate}\n\n"
    # whether a candidate stands in a fence, longer than any run of backticks in it: "auto", where
    # the reward is one of the package's for code or free text ("code", "code_all", "instructions");
    # "always"; "never"
    c.prompt.fence = "auto"
    # candidate that hit the limit: "keep_tail", "drop" or "mark"
    c.prompt.truncated = "keep_tail"
    # tokens of a truncated candidate that "keep_tail" and "mark" keep
    c.prompt.keep_tail_tokens = 4096
    # of every candidate its last so many tokens are shown, 0 = all: bounds prompts over many rounds
    c.prompt.candidate_tail = 0
    # "answer_only" drops a candidate's <think> block, "full" keeps it
    c.prompt.thinking = "answer_only"
    c.prompt.max_problem_tokens = 1024  # longer search prompts are left out and counted (paper)

    c.search = ConfigDict()
    c.search.traces = 8  # N (paper)
    c.search.max_tokens = 4096  # limit of a search trace (paper)
    # of search traces in training (paper); top-p and top-k do not exist there: their log-probs
    # would be others
    c.search.temperature = 1.0

    c.aggregation = ConfigDict()
    c.aggregation.subsets = 4  # K subsets of a problem's N traces (paper)
    c.aggregation.subset_size = 4  # S (paper)
    c.aggregation.traces = 4  # M for each subset (paper)
    c.aggregation.max_tokens = 4096  # limit of an aggregation trace (paper)
    c.aggregation.temperature = 1.0  # the same of aggregation traces (paper)
    # R: in round 1 the sets are of search traces (paper), in each later one of the K * M traces of
    # the round before, which earn the success of the sets that they are in beside their own. RSA at
    # evaluation goes on like that.
    c.aggregation.rounds = 1
    # of a subset's candidates in the prompt; or "sampled", as they were drawn
    c.aggregation.order = "shuffled"

    # Population replay: the answers of a problem's first round of aggregation are kept, and
    # aggregation groups of later steps read them, as deeper rounds would, aggregation.rounds of
    # them. What is read is of earlier steps and earns nothing; the new answers are trained as all
    # aggregations are. Those of the first of these rounds take the place of what they have read
    # once those of the last have earned as much
    c.replay = ConfigDict()
    c.replay.problems = 0  # stored populations that a step reads, K sets of each; 0 = no replay
    c.replay.max_age = 8  # steps after which a population is read no more
    c.replay.uses = 4  # steps that read a population at most, as long as answers earn less
    c.replay.rounds = 10  # the deepest round that is trained; one after search is round 1

    c.sampling = ConfigDict()
    # for the pages that hold keys and values: at most 1, a share of what weights and state leave
    # free of a device's memory; above 1, bytes of each device
    c.sampling.memory = 0.8
    # traces that each shard of the mesh's data * fsdp decodes at once; 0 = as many as the pages
    # feed, at most 1,024, on CPUs 128
    c.sampling.rows = 0
    # of keys and values: "compute" (model.compute_dtype) or "int8"
    c.sampling.cache_dtype = "compute"
    c.sampling.chunk = 64  # decode steps between two looks at who has ended, at most
    # prompt tokens, padding included, prefilled at once on each shard
    c.sampling.prefill_tokens = 16384
    # of them in each prompt, as many as run, and attend to each other, at once; where attention
    # is computed by kernels, 2,048 at least
    c.sampling.prefill_chunk = 256
    # share of problems that are expected to carry a signal, until some are decided
    c.sampling.keep_rate = 0.5
    # at most this many times batch.problems are tried for one batch
    c.sampling.max_ratio = 4.0

    c.batch = ConfigDict()
    c.batch.problems = 256  # B kept problems an optimizer step (paper)
    # (P, G) of the search micro-batches, ascending; () = what the limits on prompts and traces ask
    c.batch.search_lengths = ()
    # U of a search micro-batch; 0 = as many as have 32,768 tokens on each shard of the groups
    c.batch.search_groups = 0
    c.batch.aggregation_lengths = ()  # the same for aggregation
    c.batch.aggregation_groups = 0  # the same for aggregation

    c.loss = ConfigDict()
    c.loss.estimator = "marginal_mean"  # a row of objective/estimators.py (paper)
    # "unbiased": both terms are gradients of the same J; "sum" (unpublished)
    c.loss.normalizer = "unbiased"
    c.loss.search_weight = 1.0  # w_s (unpublished), of search traces
    # w_a (unpublished), of answers: of what they earn against their own set and, with more rounds,
    # by the sets that read them
    c.loss.aggregation_weight = 1.0
    # positive advantages die above this length: tokens if > 1, else a fraction of the limit;
    # 0 = only on traces that were cut off by the limit (paper; its value is unpublished)
    c.loss.length_gate = 0.0
    # importance weights sampler -> trainer are truncated here; 0 = off, usual 2 (paper: off)
    c.loss.tis_cap = 0.0
    # of the KL to the reference, nat a token, mean over the role's tokens; 0 = off (paper). The
    # reference is the base without adapters, or in full fine-tuning a copy of what the run
    # started from
    c.loss.kl_coef = 0.0
    c.loss.logprob_chunk = 256  # response positions of each trace whose logits exist at once

    c.optimizer = ConfigDict()
    c.optimizer.lr = 2e-5  # peak learning rate (paper)
    # after warm-up: "constant", "linear" or "cosine" to zero at train.steps
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0  # linear from lr / (warmup_steps + 1)
    c.optimizer.b1 = 0.9  # Adam (the paper's framework's default)
    c.optimizer.b2 = 0.95  # (the same default)
    c.optimizer.eps = 1e-8  # (the same default)
    c.optimizer.weight_decay = 0.0  # decoupled, on matrices only
    c.optimizer.clip_norm = 0.0  # of the global gradient; 0 = no clipping

    c.train = ConfigDict()
    c.train.steps = 250  # optimizer steps (paper: about 250)
    # stop after the step that reaches this many sampled tokens; 0 = no limit
    c.train.max_sampled_tokens = 0
    # first step: largest |log ratio| a token, sampler against trainer; 0 = off
    c.train.mismatch_limit = 0.0
    # steps in a row without a finite loss or gradient (each is skipped) that end it
    c.train.max_bad_steps = 3
    # A loss or gradient norm this many median deviations from the median of the last steps is
    # flagged; 0 = off
    c.train.spike = 12.0
    # A step, or an evaluation, that takes so many times the median has all stacks printed, once;
    # while there is no median, one that takes wait_s; 0 = off
    c.train.watchdog = 10.0
    # seconds for data, weights or a checkpoint to be read or written, then the run ends
    c.train.wait_s = 1800.0
    # seconds from SIGTERM to the end, a checkpoint included (below most clouds' 30)
    c.train.grace_s = 25.0

    c.eval = ConfigDict()
    c.eval.problems = 512  # held-out problems; 0 = no evaluation
    # steps between evaluations beside those at the start and the end; 0 = only those
    c.eval.every = 0
    c.eval.subsets = 2  # disjoint subsets of a problem's traces that are aggregated
    # S traces in each of them; 0 = aggregation.subset_size, as in training
    c.eval.subset_size = 0
    c.eval.traces = 2  # M aggregation traces for each of them
    c.eval.search_temperature = 1.0  # of search traces; 0 = greedy
    c.eval.aggregation_temperature = 1.0  # of aggregation traces and of RSA; 0 = greedy
    # only the k most likely tokens; 0 = all. These cuts exist in evaluation alone
    c.eval.top_k = 0
    c.eval.top_p = 1.0  # only the most likely tokens that together hold this mass; 1 = all
    # only tokens at least this fraction as likely as the most likely one; 0 = all
    c.eval.min_p = 0.0
    c.eval.rounds_in_training = 0  # rounds of RSA in evaluations during training; 0 = none
    c.eval.population = 8  # traces in the population of recursive self-aggregation, RSA (paper)
    c.eval.set_size = 4  # of which each member of the next population reads so many (paper)
    # The rest is for `python -m spiral_jax.evaluate` alone; evaluations during training sample
    # search.traces.
    # search traces of a problem: pass@k and maj@k up to k = n (the paper draws 256)
    c.eval.n = 64
    # whose search traces are aggregated: "" = the model's own; "base" = those of model.hf_path as
    # it is; WORKDIR@step = those of a run: what search and what aggregation have learned can be
    # told apart by pairing them anew
    c.eval.searcher = ""
    # tokens, ascending: the search traces once more, cut off here; up to search.max_tokens
    c.eval.limits = ()
    c.eval.rounds = 10  # of RSA, after the search traces (paper: up to 10)
    # problems sampled at once; a stopped evaluation goes on after the last whole wave
    c.eval.wave = 32

    c.verifier = ConfigDict()
    c.verifier.workers = 2  # child processes
    # seconds for one answer, counted from when a worker picks it up
    c.verifier.timeout_s = 5.0
    # share of our own failures in a batch above which the run stops
    c.verifier.max_error_rate = 0.05
    # share of answers in a batch for which a reward of yours took too long, above which the run
    # stops; they have no reward
    c.verifier.max_timeout_rate = 0.05
    c.verifier.memory_gb = 4.0  # address space of a child process, 10^9 bytes
    # names of variables, such as a judge's key, that a reward of yours sees
    c.verifier.environment = ()

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10  # steps; the last step is always saved; 0 = only that
    c.checkpoint.keep = 2  # newest checkpoints that are kept
    c.checkpoint.keep_every = 0  # and those whose step is a multiple of this; 0 = none
    # and the best by this measure of the evaluations, one of MEASURES; "" = none
    c.checkpoint.keep_best = ""
    # saves in a row that may fail, as on a full disk, before the run ends
    c.checkpoint.max_failures = 3

    c.metrics = ConfigDict()
    # any of METRIC_WRITERS: where metrics are shown, beside metrics.jsonl
    c.metrics.writers = ()

    c.profile = ConfigDict()
    # (first, end): steps first <= step < end are profiled, into WORKDIR/profile; () = none
    c.profile.steps = ()

    c.trace_log = ConfigDict()
    c.trace_log.every = 10  # steps between files of traces; 0 = none
    c.trace_log.fraction = 1.0  # share of a step's problems that are written
    c.trace_log.keep_steps = 50  # newest files that are kept

    c.resume = ConfigDict()  # no part of what a run is: not compared when it is resumed
    # fields, such as ("train.steps", "verifier"), that a resumed run may change
    c.resume.allow = ()
    return c.lock()


def digest(c: ConfigDict) -> str:
    """SHA-256 of the configuration's JSON: two runs with the same digest were asked for the same
    thing.
    """
    return digest_of(to_plain(c))


def digest_of(plain: dict) -> str:
    """The same of plain JSON types."""
    return hashlib.sha256(json.dumps(compared(plain), sort_keys=True).encode()).hexdigest()


def compared(plain: dict) -> dict:
    """A plain configuration without `resume`, which says how to go on and not what the run is."""
    return {room: fields for room, fields in plain.items() if room != "resume"}


def to_plain(c: ConfigDict) -> dict:
    """The configuration as plain JSON types (tuples become lists)."""
    return json.loads(c.to_json_best_effort())


# Fields of earlier versions, with the one value that still means the same: nothing.
_RETIRED = {
    "loss.clip_low": 0.0,
    "loss.clip_high": 0.0,
    "loss.dual_clip": 0.0,
    "sampling.verdict_delay": 2,
}
# Fields of earlier versions, and those that have their value now.
_MOVED = {
    "sampling.temperature": ("search.temperature", "aggregation.temperature"),
    "eval.temperature": ("eval.search_temperature", "eval.aggregation_temperature"),
}


def as_current(plain: dict) -> dict:
    """A plain configuration that an earlier version may have written, as this one would write it.

    Fields and sections that it did not have get their defaults, which mean what it did; attention
    may be computed by other kernels. What is no run's configuration, as it names no model, stays as
    it is.

    Raises:
      ConfigError: a field that no longer exists has a value that meant something.
    """
    if "model" not in plain:
        return plain
    current = {name: dict(of) if isinstance(of, dict) else of for name, of in plain.items()}
    for field, inert in _RETIRED.items():
        section, name = field.split(".")
        value = current.get(section, {}).pop(name, inert)
        if value != inert:
            raise ConfigError(
                f"config.{field} = {value!r}: this field no longer exists, and the run was made "
                f"with another value than {inert!r}. Use the version of spiral_jax that made it."
            )
    for field, heirs in _MOVED.items():
        section, name = field.split(".")
        if name not in current.get(section, {}):
            continue
        value = current[section].pop(name)
        for heir in heirs:
            section, name = heir.split(".")
            current.setdefault(section, {})[name] = value
    for section, fields in to_plain(defaults()).items():
        if isinstance(fields, dict):
            current[section] = fields | current.get(section, {})
    return current


def from_plain(plain: dict) -> ConfigDict:
    """The configuration that `to_plain` wrote; a field that did not exist then has its default.

    Raises:
      ConfigError: a field that this version does not know, or a value of another type.
    """
    c = defaults()
    try:
        with (
            c.prompt.template_kwargs.unlocked(),
            c.task.generator_args.unlocked(),
            c.task.environment_args.unlocked(),
            c.task.environment_eval_args.unlocked(),
            c.task.rewards.unlocked(),
        ):  # names there are not ours
            c.update(plain)
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"a configuration of another version of spiral_jax: {error.args[0]}"
        ) from error
    return c


def difference(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines `field: old -> new` for every field in which two plain configurations differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
