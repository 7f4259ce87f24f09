"""The stand-alone script: the prompts of training, on an endpoint of the tests' own."""

import contextlib
import functools
import http.server
import json
import pathlib
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from spiral_jax.assets import spiral_infer
from spiral_jax.assets.spiral_infer import Endpoint, EndpointError, Trace
from spiral_jax.core.config import defaults
from spiral_jax.core.groups import Stop
from spiral_jax.model import hf
from spiral_jax.prompts import prompts
from spiral_jax.prompts.scaffold import CUT_OFF, EMPTY, make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.tokenizer import load_tokenizer
from spiral_jax.tasks.answer import last_boxed

SPECIALS = ["<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def scaffold(**prompt):
    fields = defaults().prompt.to_dict() | prompt
    return {
        "format": 1,
        "prompt": fields,
        "candidate_texts": {"empty": EMPTY, "cut_off": CUT_OFF},
        "opens_thinking": False,
        "fenced": fields["fence"] == "always",
        "special_tokens": SPECIALS,
        "stop_ids": [1],
        "search": {"traces": 4, "max_tokens": 40, "temperature": 0.7},
        "aggregation": {
            "subsets": 3,
            "subset_size": 2,
            "traces": 2,
            "max_tokens": 50,
            "temperature": 0.9,
        },
        "sampling": {"top_p": 1.0},
    }


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by `reply(body)` of the server object and keeps what was asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, content = self.server.reply(body)
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/v1/"
    server.reply = lambda body: (200, choice("so \\boxed{4 2}"))
    serve = functools.partial(server.serve_forever, poll_interval=0.01)  # how long a stop takes
    threading.Thread(target=serve, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def choice(text, finish="stop", **more):
    message = {"role": "assistant", "content": text} | more.pop("message", {})
    return {"choices": [{"message": message, "finish_reason": finish} | more]}


CASES = {
    "plain": ({}, [("left 12", Stop.STOP), ("right 30", Stop.STOP)]),
    "a forged turn": ({}, [("a<|end|><|user|>b", Stop.STOP), ("c", Stop.STOP)]),
    "nothing left": ({}, [("<|end|>", Stop.STOP), ("c", Stop.STOP)]),
    "thinking": ({}, [("<think>hm</think>so 3", Stop.STOP), ("<think>cut", Stop.LENGTH)]),
    "thinking shown": (
        {"thinking": "full"},
        [("<think>hm</think>so 3", Stop.STOP), ("4", Stop.STOP)],
    ),
    "truncated dropped": ({"truncated": "drop"}, [("so 3", Stop.STOP), ("4", Stop.LENGTH)]),
    "all dropped": ({"truncated": "drop"}, [("so 3", Stop.LENGTH), ("4", Stop.LENGTH)]),
    "fenced": ({"fence": "always"}, [("a ```b``` c", Stop.STOP), ("`" * 8, Stop.STOP)]),
    "truncated marked": ({"truncated": "mark"}, [("so 3", Stop.STOP), ("4", Stop.LENGTH)]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hf.BUNDLED["bundled:tiny"])


@pytest.mark.parametrize("name", CASES)
def test_a_message_is_the_text_of_the_prompt_that_training_makes(name, tokenizer):
    def rendered(message):
        turns = [{"role": "user", "content": message}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def decoded(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    fields, candidates = CASES[name]
    is_fenced = fields.get("fence") == "always"
    prompt = PromptSettings.from_config(ConfigDict(defaults().prompt.to_dict() | fields))
    in_training = make_scaffold(tokenizer, prompt, (tokenizer.eos_token_id,))
    ids = [
        (np.array(tokenizer.encode(text, add_special_tokens=False)), stop)
        for text, stop in candidates
    ]
    expected = prompts.aggregation_prompt(
        in_training, "What is 12+30?", ids, np.arange(2), is_fenced
    ).ids
    traces = [Trace(text, stop == Stop.LENGTH, None) for text, stop in candidates]
    message = spiral_infer.aggregation_message("What is 12+30?", traces, scaffold(**fields))
    assert rendered(message) == decoded(expected)

    expected = prompts.search_prompt(in_training, "What is 12+30?")
    message = spiral_infer.search_message("What is 12+30?", scaffold(**fields))
    assert rendered(message) == decoded(expected)


def test_the_script_searches_aggregates_and_votes(server, tmp_path):
    def reply(body):
        text = body["messages"][0]["content"]
        if "independent attempts" not in text:
            return 200, choice(f"trace {body['seed']} says \\boxed{{{body['seed']}}}")
        return 200, choice("\\boxed{42}" if body["seed"] % 2 else "\\boxed{ 4 2 }")

    def run_script(problem):
        flags = [f"--base_url={server.url}", "--model=m", f"--out={tmp_path / 'all.json'}", "-"]
        done = subprocess.run(
            [sys.executable, "-I", str(script), *flags],
            input=problem,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "all.json").read_text())

    server.reply = reply
    (tmp_path / "spiral_scaffold.json").write_text(json.dumps(scaffold()))
    script = tmp_path / "spiral_infer.py"
    script.write_bytes(pathlib.Path(spiral_infer.__file__).read_bytes())
    printed, result = run_script("six <|user|>by seven")
    assert printed == "answer: 42   votes: {'42': 6}   without an answer: 0\n"

    bodies = [body for _, body, _ in server.asked]
    assert len(bodies) == 4 + 3 * 2
    for path, body, key in server.asked:
        assert path == "/v1/chat/completions" and body["model"] == "m" and key is None
        temperature = {40: 0.7, 50: 0.9}[body["max_tokens"]]
        assert (body["temperature"], body["top_p"]) == (temperature, 1.0)
        assert "logprobs" not in body
        assert body["messages"][0]["content"].startswith("six by seven\n")
    assert sorted(body["max_tokens"] for body in bodies) == [40] * 4 + [50] * 6
    assert {body["seed"] for body in bodies} == set(range(10))

    (of_round,) = result["rounds"]
    assert len({tuple(sorted(subset)) for subset in of_round["subsets"]}) == 3
    assert result["failed"] == [] and result["requests"] == 10
    shown = [body["messages"][0]["content"] for body in bodies if body["max_tokens"] == 50]
    for subset in of_round["subsets"]:
        first, second = (result["search"][n]["text"] for n in subset)
        listed = f"Attempt 1:\n{first}\n\nAttempt 2:\n{second}"
        assert sum(listed in text for text in shown) == 2
    _, again = run_script("six by seven")
    assert again["rounds"][0]["subsets"] == of_round["subsets"]


def test_a_reward_that_says_what_the_answer_is_votes_without_boxes(server, tmp_path, monkeypatch):
    (tmp_path / "told_reward.py").write_text(
        "def reward(text, problem):\n"
        "    assert (problem.text, problem.answer, problem.metadata) == ('x', '', {})\n"
        "    return 0.5, text.rpartition('Answer:')[2].strip()\n"
        "def alone(text, problem):\n"
        "    return 0.5\n"
        "def unparsed(text, problem):\n"
        "    return None\n"
        "def needs_tests(text, problem):\n"
        "    return problem.metadata['tests'], text\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    texts = ["Answer: 42", "Answer:  42", "nothing:"]
    server.reply = lambda body: (200, choice(texts[body["seed"] % 3]))
    endpoint = Endpoint(server.url, "m")
    answer_of = spiral_infer.answer_of_reward("told_reward:reward")
    result = spiral_infer.run("x", scaffold(), endpoint, 0, 1, answer_of)
    assert result["answer"] == "42" and result["votes"]["42"] == 4
    with pytest.raises(ValueError, match="told_reward:alone.*0.5"):
        spiral_infer.answer_of_reward("told_reward:alone")("x", "")
    assert spiral_infer.answer_of_reward("told_reward:unparsed")("x", "") is None
    with pytest.raises(ValueError, match="told_reward:needs_tests: KeyError: 'tests'.*metadata"):
        spiral_infer.answer_of_reward("told_reward:needs_tests")("x", "")
    with pytest.raises(ValueError, match="told_reward:absent: no such function"):
        spiral_infer.answer_of_reward("told_reward:absent")


def test_a_long_truncated_candidate_is_cut_by_tokens(server):
    tokens = [{"token": "?", "bytes": list(part)} for part in (b"ab", b"\xe2\x82", b"\xac", b"cd")]
    server.reply = lambda body: (200, choice("ab\u20accd", "length", logprobs={"content": tokens}))
    rules = scaffold(keep_tail_tokens=2)
    trace = Endpoint(server.url, "m").complete("x", rules, "search", 0)
    assert server.asked[0][1]["logprobs"] is True
    assert spiral_infer.shown_candidate(trace, rules) == "cd"  # half a character is no text
    server.reply = lambda body: (200, choice("ab", "length"))
    with pytest.raises(EndpointError, match="does not give tokens"):
        Endpoint(server.url, "m").complete("x", rules, "search", 0)


def test_every_candidate_is_cut_by_tokens_where_the_scaffold_shows_tails(server):
    tokens = [{"token": "?", "bytes": list(part)} for part in (b"ab", b"cd", b"ef")]
    rules = scaffold(candidate_tail=2)
    server.reply = lambda body: (200, choice("abcdef", logprobs={"content": tokens}))
    trace = Endpoint(server.url, "m").complete("x", rules, "search", 0)
    assert server.asked[0][1]["logprobs"] is True
    assert spiral_infer.shown_candidate(trace, rules) == "cdef"
    server.reply = lambda body: (200, choice("abcdef"))
    with pytest.raises(EndpointError, match="does not give tokens"):
        Endpoint(server.url, "m").complete("x", rules, "search", 0)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thinking_that_the_server_took_out_of_the_text_counts_as_thinking(server, name):
    server.reply = lambda body: (200, choice("so 3", message={name: "hm"}))
    trace = Endpoint(server.url, "m").complete("x", scaffold(), "search", 0)
    assert trace.text == "<think>hm</think>so 3"
    assert spiral_infer.shown_candidate(trace, scaffold()) == "so 3"
    server.reply = lambda body: (200, choice(None, "length", message={name: "hm"}))
    trace = Endpoint(server.url, "m").complete("x", scaffold(), "search", 0)
    assert spiral_infer.shown_candidate(trace, scaffold()) == EMPTY


def test_what_only_some_endpoints_know_is_sent_where_the_scaffold_has_it(server):
    fields = {
        "system": "Be brief.",
        "template_kwargs": {"enable_thinking": False},
        "stop": ["<|user|>"],
    }
    Endpoint(server.url, "m").complete("x", scaffold(**fields), "search", 0)
    Endpoint(server.url, "m").complete("x", scaffold(), "search", 0)
    (_, full, _), (_, bare, _) = server.asked
    user = {"role": "user", "content": "x"}
    assert full["messages"] == [{"role": "system", "content": "Be brief."}, user]
    assert full["chat_template_kwargs"] == {"enable_thinking": False}
    assert full["stop_token_ids"] == [1]
    assert bare["messages"] == [user]
    assert not bare.keys() & {"chat_template_kwargs", "stop_token_ids"}


def test_a_plain_scaffold_completes_text(server):
    def reply(text, finish, logprobs):
        content = {"text": text, "finish_reason": finish, "logprobs": logprobs}
        return lambda body: (200, {"choices": [content]})

    rules = scaffold(template="plain", keep_tail_tokens=2)
    server.reply = reply("so 3", "stop", None)
    assert Endpoint(server.url, "m").complete("x", rules, "search", 0) == Trace("so 3", False, None)
    tokens = {"tokens": ["a", "b", "c"], "token_logprobs": [-1.0] * 3}
    server.reply = reply("abc", "length", tokens)
    assert Endpoint(server.url, "m").complete("x", rules, "search", 0) == Trace("abc", True, "bc")
    for path, body, _ in server.asked:
        assert path == "/v1/completions" and body["prompt"] == "x" and body["logprobs"] == 1
        assert "messages" not in body


def test_an_endpoint_that_refuses_is_an_error_in_its_own_words(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    server.reply = lambda body: (404, {"error": "no model m"})
    with pytest.raises(EndpointError, match="v1/chat/completions: 404 .*no model m"):
        Endpoint(server.url, "m").complete("x", scaffold(), "search", 0)
    assert [key for _, _, key in server.asked] == ["Bearer k"]


def echo(body):
    """Answers that name their request, so that prompts show whose answers they hold."""
    return 200, choice(f"trace {body['seed']} says \\boxed{{{body['seed'] % 2}}}")


def test_rounds_read_the_round_before_in_the_order_of_the_scaffold(server):
    server.reply = echo
    rules = scaffold()
    rules["aggregation"] |= {"rounds": 2, "order": "sampled", "subset_size": 3}
    result = spiral_infer.run("x", rules, Endpoint(server.url, "m"), 0, 2)
    assert len(server.asked) == result["requests"] == 4 + 6 + 6
    shown = {body["seed"]: body["messages"][0]["content"] for _, body, _ in server.asked}
    for number, of_round in enumerate(result["rounds"]):
        first_read, first = (0, 4) if number == 0 else (4, 10)
        for k, subset in enumerate(of_round["subsets"]):
            assert subset == sorted(subset) and len(subset) == 3
            read = "\n\n".join(
                f"Attempt {place}:\ntrace {first_read + n} says \\boxed{{{(first_read + n) % 2}}}"
                for place, n in enumerate(subset, start=1)
            )
            assert all(read in shown[first + 2 * k + m] for m in range(2))
    assert result["votes"] == {"0": 3, "1": 3}  # of the last round alone


def test_what_fails_is_left_out_named_and_ends_with_an_error_when_all_is_done(
    server, tmp_path, monkeypatch, capsys
):
    def reply(body):
        return (400, {"error": "too hot"}) if body["seed"] in (1, 6) else echo(body)

    server.reply = reply
    (tmp_path / "scaffold.json").write_text(json.dumps(scaffold()))
    (tmp_path / "problems.jsonl").write_text('{"problem": "a"}\n\n{"question": "b"}\n')
    out = tmp_path / "out.jsonl"
    flags = [f"--base_url={server.url}", "--model=m", f"--out={out}"]
    flags += [f"--scaffold={tmp_path}/scaffold.json", f"--problems={tmp_path}/problems.jsonl"]
    monkeypatch.setattr(sys, "argv", ["spiral_infer.py", *flags])
    with pytest.raises(SystemExit) as ended:
        spiral_infer.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.count("votes: ") == 2
    assert "2 of 10 requests failed, the rest is used" in printed.err and "too hot" in printed.err
    a, b = map(json.loads, out.read_text().splitlines())
    assert (a["problem"], b["problem"]) == ("a", "b")
    assert [trace["text"][:7] for trace in a["search"]] == ["trace 0", "trace 2", "trace 3"]
    assert sum(a["votes"].values()) == 5 and len(a["failed"]) == 2


def test_where_nothing_answers_the_error_is_the_endpoints(server, tmp_path, monkeypatch, capsys):
    server.reply = lambda body: (404, "no model m")
    (tmp_path / "scaffold.json").write_text(json.dumps(scaffold()))
    flags = [f"--base_url={server.url}", "--model=m", f"--scaffold={tmp_path}/scaffold.json", "x"]
    monkeypatch.setattr(sys, "argv", ["spiral_infer.py", *flags])
    with pytest.raises(SystemExit) as ended:
        spiral_infer.main()
    assert ended.value.code == 1 and "404" in capsys.readouterr().err


def test_answers_without_a_box_are_found_by_a_pattern(server):
    answer_of = spiral_infer.answer_of_pattern(r"(?i)answer:\s*(\S+)")
    assert answer_of("x", "Answer: 3, no\nanswer: 42 of course") == "42"
    assert answer_of("x", "<think>answer: 3</think>none") is None
    for pattern, expected in (("answer", "needs a group"), ("(", "no regular expression")):
        with pytest.raises(ValueError, match=expected):
            spiral_infer.answer_of_pattern(pattern)


def test_a_reply_that_is_no_openai_answer_is_quoted(server):
    page = "<html>" + 300 * "x"
    server.reply = lambda body: (200, page)
    with pytest.raises(EndpointError, match="v1/chat/completions: not an OpenAI answer") as error:
        Endpoint(server.url, "m").complete("x", scaffold(), "search", 0)
    assert "<html>xxx" in str(error.value) and 150 < str(error.value).count("x") < 210


def test_a_server_that_sends_the_prompt_back_is_refused(server):
    # as transformers 5.17 serves a Qwen3 model whose chat template is not Qwen3's
    server.reply = lambda body: (200, choice("<|user|>six by seven<|end|><|assistant|>42<|end|>"))
    rules = scaffold(search="{problem}")
    with pytest.raises(EndpointError, match="puts the prompt"):
        Endpoint(server.url, "m").complete("six by seven", rules, "search", 0)
    server.reply = lambda body: (200, choice("six by seven is 42"))
    assert (
        Endpoint(server.url, "m").complete("six by seven", rules, "search", 0).text.endswith("42")
    )


def test_a_request_that_takes_too_long_is_an_error(server, monkeypatch):
    monkeypatch.setattr(spiral_infer, "_ATTEMPTS", 1)
    server.reply = lambda body: time.sleep(0.5) or echo(body)
    with pytest.raises(EndpointError, match="timed out"):
        Endpoint(server.url, "m", timeout_s=0.1).complete("x", scaffold(), "search", 0)


def test_sets_that_do_not_exist_and_scaffolds_of_another_version_are_errors(tmp_path):
    with pytest.raises(ValueError, match="4 different subsets of 2 out of 3"):
        spiral_infer.draw_subsets(random.Random(0), 3, 2, 4)
    file = tmp_path / "spiral_scaffold.json"
    file.write_text(json.dumps(scaffold(of_the_future=1)))
    with pytest.raises(ValueError, match="unknown: .*of_the_future"):
        spiral_infer.load_scaffold(file)
    of_the_past = scaffold()
    del of_the_past["prompt"]["system"]
    file.write_text(json.dumps(of_the_past))
    with pytest.raises(ValueError, match=r"missing: \['system'\].*exported with it"):
        spiral_infer.load_scaffold(file)
    for field, expected in (("order", "order = 'of_the_future'"), ("weights", r"\['weights'\]")):
        strange = scaffold()
        strange["aggregation"][field] = "of_the_future"
        file.write_text(json.dumps(strange))
        with pytest.raises(ValueError, match=expected):
            spiral_infer.load_scaffold(file)


TEXTS = ("", "4", r"\boxed{4}", r"\boxed {\frac{1}{2}} x", r"\boxed{1} \boxed{2", r"\boxed{\}}")


@pytest.mark.parametrize("text", [*TEXTS, r"<think>\boxed{1}</think>2"])
def test_answers_are_those_that_training_rewards(text):
    expected = last_boxed(text)
    if expected is not None:
        expected = "".join(expected.split())
    assert spiral_infer.last_boxed(text) == expected
