"""Search and aggregation on any OpenAI-style endpoint, as a model was trained to. Stand-alone.

    python spiral_infer.py --base_url=http://localhost:8000/v1 --model=NAME "What is 6 * 7?"
    python spiral_infer.py --base_url=... --model=NAME --problems=problems.jsonl --out=answers.jsonl

("-": the problem comes from stdin.) spiral_scaffold.json, beside this file, has prompts, rules and
sizes: N search traces, K subsets of S of them, M aggregation traces for each, in more rounds K
subsets of those and so on, then a vote among the answers of the last round. Needs Python >= 3.11
and nothing else; a key, if one is needed, comes from the environment: OPENAI_API_KEY. Requests that
fail are left out, and named: the exit code is 1 then.

In training candidates are spliced into prompts as token ids. An endpoint takes text, so the strings
of special tokens are removed from problem and candidates here: otherwise they would become turns of
the conversation. Two things are beyond OpenAI's fields and sent only where the scaffold needs them,
as vLLM and SGLang read them: chat_template_kwargs and stop_token_ids.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import http.client
import importlib
import json
import math
import os
import pathlib
import random
import re
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable

_KNOWN_PROMPT_FIELDS = {
    "template",
    "system",
    "template_kwargs",
    "stop",
    "search",
    "aggregation",
    "candidate",
    "fence",
    "truncated",
    "keep_tail_tokens",
    "candidate_tail",
    "thinking",
    "max_problem_tokens",
}
_KNOWN_STAGE_FIELDS = {
    "search": {"traces", "max_tokens", "temperature"},
    "aggregation": {
        *("traces", "max_tokens", "temperature", "subsets", "subset_size", "rounds", "order")
    },
}
_ORDERS = ("shuffled", "sampled")
_LEAST_FENCE, _MOST_FENCE = 3, 8  # backticks around a candidate
_ATTEMPTS = 4
_TRACES_PER_SEED = 10_000  # the traces of one --seed have seeds of their own below this
_TIMEOUT_S = 1800.0
_SHOWN = 200  # characters of a reply that is none
_QUIET_S = 10.0  # between two lines of progress where there is no terminal


class EndpointError(RuntimeError):
    """The endpoint cannot be reached or refuses; the message has its own words."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """A sampled answer.

    Attributes:
      text: all of it, thinking too.
      truncated: whether the token limit cut it off.
      tail: its last tokens, where the scaffold shows no more of it.
    """

    text: str
    truncated: bool
    tail: str | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the endpoint has sampled.

    Attributes:
      text: without thinking that the server has cut out.
      thought: that thinking; None: nothing was cut out.
      truncated: whether the token limit cut it off.
      tokens: the bytes of each token, empty if the endpoint does not give them.
    """

    text: str
    thought: str | None
    truncated: bool
    tokens: list[bytes]


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where completions come from.

    Attributes:
      timeout_s: seconds for one request.
    """

    base_url: str
    model: str
    timeout_s: float = _TIMEOUT_S

    def complete(self, message: str, scaffold: dict, stage: str, seed: int) -> Trace:
        """One trace of "search" or "aggregation", prompted and sampled as in training."""
        rule, max_tokens = scaffold["prompt"], scaffold[stage]["max_tokens"]
        tails = {True: rule["keep_tail_tokens"], False: max_tokens}  # by truncated
        if every := rule.get("candidate_tail"):  # scaffolds of earlier exports have none
            tails = {cut: min(every, tail) for cut, tail in tails.items()}
        if rule["truncated"] == "drop":
            tails[True] = tails[False]
        needs_tail = min(tails.values()) < max_tokens
        body = {"model": self.model, "seed": seed, "max_tokens": max_tokens, **scaffold["sampling"]}
        body["temperature"] = scaffold[stage]["temperature"]
        if rule["stop"]:  # the model's own stop ids are known to the server
            body["stop_token_ids"] = scaffold["stop_ids"]
        ask = self._continue_text if rule["template"] == "plain" else self._answer_chat
        completion = ask(message, rule, body, needs_tail)

        text = completion.text
        if message in text and remove_specials(text, scaffold) != text:
            raise EndpointError(
                f"{self.base_url}: the server puts the prompt, with its special tokens, into its "
                "answers. transformers' serve does so where tokenizer_config.json does not say "
                "what an answer is (response_template): export the model again, or use another "
                "server."
            )
        if completion.thought is not None:
            opening = "" if scaffold["opens_thinking"] else "<think>"
            closing = "</think>" if text else ""
            text = opening + completion.thought + closing + text

        tail = None
        if tails[completion.truncated] < max_tokens:
            if not completion.tokens:
                raise EndpointError(
                    "the scaffold shows the last tokens of candidates, but the endpoint does not "
                    "give tokens (logprobs). Serve the model with log-probs."
                )
            last = completion.tokens[-tails[completion.truncated] :]
            tail = b"".join(last).decode(errors="ignore")
        return Trace(text, completion.truncated, tail)

    def _continue_text(self, prompt: str, rule: dict, body: dict, with_tokens: bool) -> Completion:
        body = body | {"prompt": prompt}
        if with_tokens:
            body["logprobs"] = 1

        def read(choice: dict) -> Completion:
            tokens = (choice.get("logprobs") or {}).get("tokens", [])
            return Completion(
                text=choice["text"],
                thought=None,
                truncated=choice["finish_reason"] == "length",
                tokens=[token.encode() for token in tokens],
            )

        return self._post("completions", body, read)

    def _answer_chat(self, message: str, rule: dict, body: dict, with_tokens: bool) -> Completion:
        turns = [{"role": "user", "content": message}]
        if rule["system"]:
            turns.insert(0, {"role": "system", "content": rule["system"]})
        body = body | {"messages": turns}
        if rule["template_kwargs"]:
            body["chat_template_kwargs"] = rule["template_kwargs"]
        if with_tokens:
            body["logprobs"] = True

        def read(choice: dict) -> Completion:
            message = choice["message"]
            tokens = (choice.get("logprobs") or {}).get("content") or []
            return Completion(
                text=message.get("content") or "",
                # vLLM's name since 2026, and the older one, which others keep
                thought=message.get("reasoning") or message.get("reasoning_content"),
                truncated=choice["finish_reason"] == "length",
                tokens=[bytes(token.get("bytes") or token["token"].encode()) for token in tokens],
            )

        return self._post("chat/completions", body, read)

    def _post(self, path: str, body: dict, read: Callable[[dict], Completion]) -> Completion:
        """What `read` makes of the reply's first choice."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(_ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    reply = response.read()
                try:
                    return read(json.loads(reply)["choices"][0])
                except (ValueError, LookupError, TypeError, AttributeError):
                    shown = reply.decode(errors="replace")[:_SHOWN]
                    raise EndpointError(f"{url}: not an OpenAI answer: {shown!r}") from None
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read().decode(errors='replace')[:500]}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = str(error)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(2**attempt * 0.5)
        raise EndpointError(f"{url}: {reason}")


def remove_specials(text: str, scaffold: dict) -> str:
    """`text` without the strings of special tokens.

    Until none is left: removing one may join another.
    """
    longest_first = sorted(scaffold["special_tokens"], key=len, reverse=True)
    specials = "|".join(re.escape(token) for token in longest_first)
    while specials and re.search(specials, text):
        text = re.sub(specials, "", text)
    return text


def shown_candidate(trace: Trace, scaffold: dict) -> str | None:
    """What an aggregation prompt shows of a trace; None if it is left out."""
    rule, words = scaffold["prompt"], scaffold["candidate_texts"]
    if trace.truncated and rule["truncated"] == "drop":
        return None
    text = trace.text
    if rule["thinking"] == "answer_only":
        _, closed, rest = text.rpartition("</think>")
        unclosed = "<think>" in rest or (scaffold["opens_thinking"] and not closed)
        text = "" if unclosed else rest
    if trace.tail is not None and len(trace.tail) < len(text):
        text = trace.tail
    text = remove_specials(text, scaffold)
    if not text:
        return words["empty"]
    if trace.truncated and rule["truncated"] == "mark":
        text = words["cut_off"] + text
    return fenced(text, words["empty"]) if scaffold["fenced"] else text


def fenced(text: str, empty: str) -> str:
    """A candidate in a fence that nothing in it closes; `empty` if that would be too long."""
    longest_run = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(_LEAST_FENCE, longest_run + 1)
    return f"{fence}\n{text}\n{fence}" if len(fence) <= _MOST_FENCE else empty


def search_message(problem: str, scaffold: dict) -> str:
    return scaffold["prompt"]["search"].format(problem=remove_specials(problem, scaffold))


def aggregation_message(problem: str, candidates: list[Trace], scaffold: dict) -> str:
    """The message that shows `candidates` in the given order."""
    texts = [shown_candidate(trace, scaffold) for trace in candidates]
    shown = [text for text in texts if text is not None] or [scaffold["candidate_texts"]["empty"]]
    template = scaffold["prompt"]["candidate"]
    listed = [template.format(index=i, candidate=text) for i, text in enumerate(shown, start=1)]
    return scaffold["prompt"]["aggregation"].format(
        problem=remove_specials(problem, scaffold), count=len(shown), candidates="".join(listed)
    )


def draw_subsets(
    rng: random.Random, n: int, size: int, count: int, order: str = "shuffled"
) -> list[list[int]]:
    """`count` distinct subsets of `size` of n traces, each in the order in which it is shown."""
    if not 1 <= size <= n or not 1 <= count <= math.comb(n, size):
        raise ValueError(
            f"{count} different subsets of {size} out of {n} traces do not exist: "
            "lower --subsets or --subset_size, or raise --traces."
        )
    drawn: dict[tuple[int, ...], list[int]] = {}
    while len(drawn) < count:
        subset = rng.sample(range(n), size)
        drawn.setdefault(tuple(sorted(subset)), subset)
    return [sorted(subset) if order == "sampled" else subset for subset in drawn.values()]


def last_boxed(text: str) -> str | None:
    r"""What is inside the last \boxed{...} after thinking, without spaces.

    None if it is missing or does not close.
    """
    answer = text.rpartition("</think>")[2]
    boxes = list(re.finditer(r"\\boxed\s*\{", answer))
    if not boxes:
        return None
    rest, depth = answer[boxes[-1].end() :], 1
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return "".join(rest[: brace.start()].split())
    return None


def boxed_answer(problem: str, text: str) -> str | None:
    """What models are trained to put into a box; the problem does not matter."""
    del problem
    return last_boxed(text)


def answer_of_reward(path: str) -> Callable[[str, str], str | None]:
    """The answers that a reward function finds: it returns (reward, answer), or None for no answer.

    Args:
      path: "package.module:function", as config.task.reward. The function is given a problem with
        its text alone: `answer` is "", `metadata` is {}.

    Raises:
      ValueError: there is no such function, it fails, or it returns something else.
    """
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--reward={path}: no such function ({error})") from error

    def answer(problem: str, text: str) -> str | None:
        asked = types.SimpleNamespace(id="", text=problem, answer="", metadata={})
        try:
            returned = reward(text, asked)
        except Exception as error:
            raise ValueError(
                f"--reward={path}: {type(error).__name__}: {error}. Here it is given a problem's "
                "text alone, without answer and metadata; where it needs them, leave the flag out "
                "or give --answer."
            ) from error
        if returned is None:
            return None
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise ValueError(f"--reward={path}: returned {returned!r}, not (reward, answer)")
        return returned[1] or None

    return answer


def answer_of_pattern(pattern: str) -> Callable[[str, str], str | None]:
    """The first group of the last match of a regular expression, behind thinking; None: no match.

    Raises:
      ValueError: no regular expression, or one without a group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--answer={pattern}: no regular expression ({error})") from error
    if compiled.groups < 1:
        raise ValueError(f"--answer={pattern}: needs a group in brackets, which is the answer")

    def answer(problem: str, text: str) -> str | None:
        del problem
        found = list(compiled.finditer(text.rpartition("</think>")[2]))
        return (found[-1].group(1) or "").strip() or None if found else None

    return answer


class Sampler:
    """Completes messages, `workers` at once; says on stderr how far it is.

    Attributes:
      failed: why requests have failed, in words.
      sent: how many there were.
    """

    def __init__(self, endpoint: Endpoint, scaffold: dict, workers: int):
        self._endpoint, self._scaffold, self._workers = endpoint, scaffold, workers
        self._said = time.monotonic()
        self.failed: list[str] = []
        self.sent = 0

    def sample(self, stage: str, messages: list[str], seed: int, round: int = 0) -> list[Trace]:
        """A trace for each message but those whose request fails; their seeds count from `seed`."""

        def complete(i: int) -> Trace:
            return self._endpoint.complete(messages[i], self._scaffold, stage, seed + i)

        name = f"{stage} {round}" if round else stage

        traces: list[Trace | None] = [None] * len(messages)
        self.sent += len(messages)
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            running = {pool.submit(complete, i): i for i in range(len(messages))}
            for done, future in enumerate(concurrent.futures.as_completed(running), start=1):
                try:
                    traces[running[future]] = future.result()
                except EndpointError as error:
                    self.failed.append(str(error))
                self._say(f"{name}: {done} of {len(messages)}", last=done == len(messages))
        return [trace for trace in traces if trace is not None]

    def _say(self, text: str, last: bool) -> None:
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif time.monotonic() - self._said > _QUIET_S:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def run(
    problem: str,
    scaffold: dict,
    endpoint: Endpoint,
    seed: int,
    workers: int,
    answer_of: Callable[[str, str], str | None] = boxed_answer,
) -> dict:
    """Search, then rounds of aggregation, `workers` requests at once; answers, votes, all texts.

    What failed is left out: sets are then drawn from fewer traces.

    Raises:
      EndpointError: all requests of a stage have failed.
    """
    search, aggregation = scaffold["search"], scaffold["aggregation"]
    rounds, order = aggregation.get("rounds", 1), aggregation.get("order", "shuffled")
    size, sets = aggregation["subset_size"], aggregation["subsets"]
    draw_subsets(random.Random(seed), search["traces"], size, sets)  # else it would fail late
    sampler, rng = Sampler(endpoint, scaffold, workers), random.Random(seed)
    first = seed * _TRACES_PER_SEED

    messages = [search_message(problem, scaffold)] * search["traces"]
    traces = sampler.sample("search", messages, first)
    found, pool, of_round = traces, traces, []
    for number in range(1, rounds + 1):
        if not pool:
            raise EndpointError(sampler.failed[0])
        S = min(size, len(pool))
        subsets = draw_subsets(rng, len(pool), S, min(sets, math.comb(len(pool), S)), order)
        messages = []
        for subset in subsets:
            message = aggregation_message(problem, [pool[n] for n in subset], scaffold)
            messages += [message] * aggregation["traces"]
        pool = sampler.sample("aggregation", messages, first + sampler.sent, number)
        of_round.append({"subsets": subsets, "traces": [dataclasses.asdict(t) for t in pool]})

    answers = [answer_of(problem, trace.text) for trace in pool]
    votes = collections.Counter(answer for answer in answers if answer is not None)
    return {
        "answer": votes.most_common(1)[0][0] if votes else None,
        "votes": dict(votes),
        "without_answer": answers.count(None),
        "search": [dataclasses.asdict(trace) for trace in found],
        "rounds": of_round,
        "requests": sampler.sent,
        "failed": sampler.failed,
    }


def load_scaffold(path: pathlib.Path) -> dict:
    """Reads the scaffold.

    Raises:
      ValueError: this script does not understand all of it.
    """
    scaffold = json.loads(path.read_text())
    unknown = sorted(scaffold["prompt"].keys() - _KNOWN_PROMPT_FIELDS)
    missing = sorted(_KNOWN_PROMPT_FIELDS - scaffold["prompt"].keys())
    if scaffold["format"] != 1 or unknown or missing:
        raise ValueError(
            f"{path}: made by another version (format {scaffold['format']}, unknown: {unknown}, "
            f"missing: {missing}). Use the script that was exported with it."
        )
    for stage, known in _KNOWN_STAGE_FIELDS.items():
        if strange := sorted(scaffold[stage].keys() - known):
            raise ValueError(
                f"{path}: {stage} has {strange}, which this script does not know. Use the one that "
                "was exported with it."
            )
    order = scaffold["aggregation"].get("order", "shuffled")
    if order not in _ORDERS:
        raise ValueError(f"{path}: aggregation.order = {order!r}: must be {' or '.join(_ORDERS)}.")
    return scaffold


def read_problems(path: pathlib.Path) -> list[str]:
    """The problems of a file: a JSON object a line, with "problem" or "question".

    Raises:
      ValueError: names the line that is none.
    """
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problems.append(row["problem"] if "problem" in row else row["question"])
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f'{path}:{number}: not a JSON object with "problem" or "question"'
            ) from None
    return problems


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = pathlib.Path(__file__).parent / "spiral_scaffold.json"
    parser.add_argument("problem", nargs="?", help='its text, or "-" to read it from stdin')
    parser.add_argument("--problems", help='JSONL file of {"problem" or "question"}, in its place')
    parser.add_argument("--base_url", required=True, help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--scaffold", default=str(beside))
    parser.add_argument("--traces", type=int, help="N search traces; default: as trained")
    parser.add_argument("--subsets", type=int, help="K; default: as trained")
    parser.add_argument("--subset_size", type=int, help="S; default: as trained")
    parser.add_argument("--aggregation_traces", type=int, help="M of a subset; default: as trained")
    parser.add_argument("--rounds", type=int, help="of aggregation; default: as trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=16, help="requests at once")
    parser.add_argument("--timeout", type=float, default=_TIMEOUT_S, help="seconds for a request")
    parser.add_argument(
        "--reward", help="package.module:function, which returns (reward, answer); default: boxes"
    )
    parser.add_argument("--answer", help="regular expression; the group of its last match")
    parser.add_argument("--out", help="file that gets every trace: a JSON object a problem")
    flags = parser.parse_args()
    if (flags.problem is None) == (flags.problems is None):
        parser.error("give a problem, or --problems=FILE")
    return flags


def main() -> None:
    flags = parse_flags()
    try:
        scaffold = load_scaffold(pathlib.Path(flags.scaffold))
        search, aggregation = scaffold["search"], scaffold["aggregation"]
        search["traces"] = flags.traces or search["traces"]
        for name in ("subsets", "subset_size", "rounds"):
            if given := getattr(flags, name):
                aggregation[name] = given
        aggregation["traces"] = flags.aggregation_traces or aggregation["traces"]
        if flags.problems:
            problems = read_problems(pathlib.Path(flags.problems))
        else:
            problems = [sys.stdin.read() if flags.problem == "-" else flags.problem]
        endpoint = Endpoint(flags.base_url, flags.model, flags.timeout)
        answer_of = boxed_answer
        if flags.reward:
            answer_of = answer_of_reward(flags.reward)
        elif flags.answer:
            answer_of = answer_of_pattern(flags.answer)
        if flags.out:
            pathlib.Path(flags.out).write_text("")
        failed = False
        for number, problem in enumerate(problems, start=1):
            if len(problems) > 1:
                print(f"problem {number} of {len(problems)}", file=sys.stderr, flush=True)
            failed |= solve(problem, scaffold, endpoint, flags, answer_of)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if failed else 0)


def solve(
    problem: str,
    scaffold: dict,
    endpoint: Endpoint,
    flags: argparse.Namespace,
    answer_of: Callable[[str, str], str | None],
) -> bool:
    """Solves a problem, prints its answer and writes it to --out; whether a request has failed."""
    try:
        result = run(problem, scaffold, endpoint, flags.seed, flags.workers, answer_of)
    except EndpointError as error:
        result = {"answer": None, "failed": [str(error)]}
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        print(
            f"answer: {result['answer']}   votes: {result['votes']}   "
            f"without an answer: {result['without_answer']}",
            flush=True,
        )
        if failed := result["failed"]:
            of = f"{len(failed)} of {result['requests']} requests failed, the rest is used"
            print(f"error: {of}: {failed[0]}", file=sys.stderr, flush=True)
    if flags.out:
        with open(flags.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"problem": problem} | result) + "\n")
    return bool(result["failed"])


if __name__ == "__main__":
    main()
