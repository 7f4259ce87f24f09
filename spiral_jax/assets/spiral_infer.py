"""Search and aggregation on any OpenAI-style endpoint, by the scaffold that a model was trained
with. Stand-alone.

    python spiral_infer.py --base_url=http://localhost:8000/v1 --model=NAME "What is 6 * 7?"      ("-": from stdin)

spiral_scaffold.json (beside this file) has prompts, rules and sizes: N search traces, K subsets of
S of them, M aggregation traces for each, then a vote among the aggregated answers. Needs Python >=
3.11 and nothing else; a key, if
one is needed, comes from the environment: OPENAI_API_KEY.

In training candidates are spliced into prompts as token ids. An endpoint takes text, so the strings
of special tokens
are removed from problem and candidates here: otherwise they would become turns of the conversation.
Two things are beyond OpenAI's fields and sent only where the scaffold needs them, as vLLM and
SGLang read them: chat_template_kwargs and stop_token_ids.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import re
import sys
import time
import urllib.error
import urllib.request

_KNOWN_PROMPT_FIELDS = {
    "template", "system", "template_kwargs", "stop", "search", "aggregation", "candidate", "truncated",
    "keep_tail_tokens", "thinking", "max_problem_tokens",
}  # fmt: skip
_ATTEMPTS = 4
_TIMEOUT_S = 1800.0


class EndpointError(RuntimeError):
    """The endpoint cannot be reached or refuses; the message has its own words."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """A sampled answer: its text, whether the token limit cut it off, and its last tokens if they
    were asked for.
    """

    text: str
    truncated: bool
    tail: str | None


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where completions come from."""

    base_url: str
    model: str

    def complete(self, message: str, scaffold: dict, max_tokens: int, seed: int) -> Trace:
        """One trace of at most `max_tokens` tokens for a message, prompted and sampled as in
        training.
        """
        rule = scaffold["prompt"]
        body = {"model": self.model, "seed": seed, "max_tokens": max_tokens, **scaffold["sampling"]}
        if rule["stop"]:  # the model's own stop ids are known to the server
            body["stop_token_ids"] = scaffold["stop_ids"]
        needs_tail = rule["truncated"] != "drop" and rule["keep_tail_tokens"] < max_tokens
        if rule["template"] == "plain":
            body |= {"prompt": message} | ({"logprobs": 1} if needs_tail else {})
            choice = self._post("completions", body)["choices"][0]
            answer = {"content": choice["text"]}
            tokens = [
                {"token": token} for token in (choice.get("logprobs") or {}).get("tokens", [])
            ]
        else:
            turns = [{"role": "system", "content": rule["system"]}] if rule["system"] else []
            body["messages"] = [*turns, {"role": "user", "content": message}]
            if rule["template_kwargs"]:
                body["chat_template_kwargs"] = rule["template_kwargs"]
            body |= {"logprobs": True} if needs_tail else {}
            choice = self._post("chat/completions", body)["choices"][0]
            answer = choice["message"]
            tokens = (choice.get("logprobs") or {}).get("content")
        text, thought = answer.get("content") or "", answer.get("reasoning_content")
        if thought is not None:  # the server has cut it out of the text
            text = (
                ("" if scaffold["opens_thinking"] else "<think>")
                + thought
                + ("</think>" + text if text else "")
            )
        truncated, tail = choice["finish_reason"] == "length", None
        if truncated and needs_tail:
            if not tokens:
                raise EndpointError("the scaffold keeps the last tokens of truncated candidates, but the endpoint does "
                                    "not give tokens (logprobs). Serve the model with log-probs.")  # fmt: skip
            last = tokens[-rule["keep_tail_tokens"] :]
            tail = b"".join(bytes(t.get("bytes") or t["token"].encode()) for t in last).decode(
                errors="ignore"
            )
        return Trace(text, truncated, tail)

    def _post(self, path: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(_ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read().decode(errors='replace')[:500]}"
                if error.code != 429 and error.code < 500:
                    break
            except OSError as error:
                reason = str(error)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(2**attempt * 0.5)
        raise EndpointError(f"{url}: {reason}")


def plain(text: str, scaffold: dict) -> str:
    """`text` without the strings of special tokens, until none is left (removing one may join
    another).
    """
    specials = "|".join(
        re.escape(token) for token in sorted(scaffold["special_tokens"], key=len, reverse=True)
    )
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
    text = plain(text, scaffold)
    if not text:
        return words["empty"]
    return words["cut_off"] + text if trace.truncated and rule["truncated"] == "mark" else text


def search_message(problem: str, scaffold: dict) -> str:
    return scaffold["prompt"]["search"].format(problem=plain(problem, scaffold))


def aggregation_message(problem: str, candidates: list[Trace], scaffold: dict) -> str:
    """The message that shows `candidates` in the given order."""
    shown = [
        text
        for text in (shown_candidate(trace, scaffold) for trace in candidates)
        if text is not None
    ]
    shown = shown or [scaffold["candidate_texts"]["empty"]]
    one = scaffold["prompt"]["candidate"]
    listed = "".join(one.format(index=i, candidate=text) for i, text in enumerate(shown, start=1))
    return scaffold["prompt"]["aggregation"].format(
        problem=plain(problem, scaffold), count=len(shown), candidates=listed
    )


def draw_subsets(rng: random.Random, n: int, size: int, count: int) -> list[list[int]]:
    """`count` distinct subsets of `size` of n traces, each in random order."""
    if not 1 <= size <= n or not 1 <= count <= math.comb(n, size):
        raise ValueError(f"{count} different subsets of {size} out of {n} traces do not exist: lower --subsets or "
                         "--subset_size, or raise --traces.")  # fmt: skip
    drawn: dict[tuple[int, ...], list[int]] = {}
    while len(drawn) < count:
        subset = rng.sample(range(n), size)
        drawn.setdefault(tuple(sorted(subset)), subset)
    return list(drawn.values())


def last_boxed(text: str) -> str | None:
    r"""What is inside the last \boxed{...} after thinking, without spaces; None if it is missing or
    does not close.
    """
    boxes = list(re.finditer(r"\\boxed\s*\{", text.rpartition("</think>")[2]))
    if not boxes:
        return None
    rest, depth = text.rpartition("</think>")[2][boxes[-1].end() :], 1
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return "".join(rest[: brace.start()].split())
    return None


def run(problem: str, scaffold: dict, endpoint: Endpoint, seed: int, workers: int) -> dict:
    """Search, then aggregation, `workers` requests at once; answers, votes and all texts."""
    s, a = scaffold["search"], scaffold["aggregation"]
    subsets = draw_subsets(random.Random(seed), s["traces"], a["subset_size"], a["subsets"])
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        sample = lambda message, limit, i: endpoint.complete(
            message, scaffold, limit, seed * 10_000 + i
        )  # noqa: E731
        message = search_message(problem, scaffold)
        found = list(pool.map(lambda i: sample(message, s["max_tokens"], i), range(s["traces"])))
        messages = [
            aggregation_message(problem, [found[n] for n in subset], scaffold) for subset in subsets
        ]
        wanted = [message for message in messages for _ in range(a["traces"])]
        numbers = itertools.count(s["traces"])
        final = list(pool.map(lambda m, i: sample(m, a["max_tokens"], i), wanted, numbers))
    votes = collections.Counter(
        answer for trace in final if (answer := last_boxed(trace.text)) is not None
    )
    return {
        "answer": votes.most_common(1)[0][0] if votes else None,
        "votes": dict(votes),
        "without_answer": len(final) - votes.total(),
        "subsets": subsets,
        "search": [dataclasses.asdict(trace) for trace in found],
        "aggregation": [dataclasses.asdict(trace) for trace in final],
    }


def load_scaffold(path: pathlib.Path) -> dict:
    """Reads the scaffold. Raises `ValueError` for one that this script does not understand in full."""
    scaffold = json.loads(path.read_text())
    unknown = sorted(scaffold["prompt"].keys() - _KNOWN_PROMPT_FIELDS)
    missing = sorted(_KNOWN_PROMPT_FIELDS - scaffold["prompt"].keys())
    if scaffold["format"] != 1 or unknown or missing:
        raise ValueError(f"{path}: made by another version (format {scaffold['format']}, unknown: {unknown}, missing: "
                         f"{missing}). Use the script that was exported with it.")  # fmt: skip
    return scaffold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", help='its text, or "-" to read it from stdin')
    parser.add_argument(
        "--base_url", required=True, help="of the endpoint, such as http://localhost:8000/v1"
    )
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument(
        "--scaffold", default=str(pathlib.Path(__file__).parent / "spiral_scaffold.json")
    )
    parser.add_argument("--traces", type=int, help="N search traces; default: as trained")
    parser.add_argument("--subsets", type=int, help="K; default: as trained")
    parser.add_argument("--subset_size", type=int, help="S; default: as trained")
    parser.add_argument(
        "--aggregation_traces", type=int, help="M for each subset; default: as trained"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=16, help="requests at once")
    parser.add_argument("--out", help="JSON file that gets every trace")
    flags = parser.parse_args()
    try:
        scaffold = load_scaffold(pathlib.Path(flags.scaffold))
        rooms = {"traces": "search", "subsets": "aggregation", "subset_size": "aggregation"}
        for name, room in rooms.items():
            scaffold[room][name] = getattr(flags, name) or scaffold[room][name]
        scaffold["aggregation"]["traces"] = (
            flags.aggregation_traces or scaffold["aggregation"]["traces"]
        )
        problem = sys.stdin.read() if flags.problem == "-" else flags.problem
        result = run(
            problem, scaffold, Endpoint(flags.base_url, flags.model), flags.seed, flags.workers
        )
    except (EndpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if flags.out:
        pathlib.Path(flags.out).write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"answer: {result['answer']}   votes: {result['votes']}   without an answer: {result['without_answer']}"
    )


if __name__ == "__main__":
    main()
