"""Tokenizers, chat templates and stop ids as models have them, and what of them cannot work."""

import json
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from scripted_sampler import (
    TOKENIZER,
    ScriptedSampler,
    math_verifier,
    number_task,
    scripted_config,
)
from small_tokenizer import CHATML, chatml_tokenizer, decode, encode, scaffold_of
from tokenizers import processors

from configs import tiny
from spiral_jax.core import config
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Purpose, Stop
from spiral_jax.model import hf
from spiral_jax.prompts import prompts
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.tokenizer import load_tokenizer, stop_ids
from spiral_jax.rollout.judge import reward, trace_texts
from spiral_jax.rollout.requests import Asked, Writer
from spiral_jax.rollout.settings import training_stages
from spiral_jax.run.setup import check_training
from spiral_jax.sampling.protocol import sample

# As Qwen3's: thinking switched off is an empty think block. As Qwen3-Thinking's where it is not:
# the answer opens it.
HYBRID = CHATML.replace(
    "<|im_start|>assistant\n",
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}",
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
DROPS_SYSTEM = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim")


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


# ---- chat templates: system message and variables


@pytest.mark.parametrize("template", [CHATML, TRIMS])
def test_the_system_message_comes_before_the_users_turn_in_both_prompts(template):
    tokenizer = chatml_tokenizer(template=template)
    scaffold = scaffold_of(
        tokenizer, system=" Be {brief}.\n", aggregation="{problem}|{candidates}", search="{problem}"
    )
    turn = decode(tokenizer, prompts.search_prompt(scaffold, "x?"))
    said = "Be {brief}." if template == TRIMS else " Be {brief}.\n"
    start = f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\n"
    assert turn == f"{start}x?<|im_end|>\n<|im_start|>assistant\n"
    both = prompts.aggregation_prompt(
        scaffold, "x?", [(encode(tokenizer, "a"), Stop.STOP)], np.arange(1)
    ).ids
    assert decode(tokenizer, both) == turn.replace("x?", "x?|Attempt 1:\na\n\n")
    assert "system" not in decode(tokenizer, prompts.search_prompt(scaffold_of(tokenizer), "x?"))


@pytest.mark.parametrize(
    ("template", "message"), [(NO_SYSTEM, "System role not supported"), (DROPS_SYSTEM, "out")]
)
def test_a_chat_template_without_a_place_for_the_system_message_is_refused(template, message):
    tokenizer = chatml_tokenizer(template=template)
    scaffold_of(tokenizer)
    with pytest.raises(
        ConfigError, match=f"prompt.system = 'Be brief.'.*{message}|{message}.*system = 'Be brief.'"
    ):
        scaffold_of(tokenizer, system="Be brief.")


def test_template_kwargs_reach_the_template_and_a_name_that_it_does_not_read_is_an_error():
    tokenizer = chatml_tokenizer(template=HYBRID)
    ends = {}
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        scaffold = scaffold_of(tokenizer, template_kwargs=kwargs)
        end = decode(tokenizer, prompts.search_prompt(scaffold, "x?")).rpartition("assistant\n")[2]
        ends[str(kwargs)] = (end, scaffold.opens_thinking)
    assert list(ends.values()) == [("<think>\n", True)] * 2 + [("<think>\n\n</think>\n\n", False)]
    with pytest.raises(
        ConfigError, match="template_kwargs has 'enable_thinkin'.*Did you mean 'enable_thinking'"
    ):
        scaffold_of(tokenizer, template_kwargs={"enable_thinkin": False})
    for name in ("messages", "add_generation_prompt", "tokenize"):
        with pytest.raises(ConfigError, match=f"template_kwargs has '{name}'"):
            scaffold_of(tokenizer, template_kwargs={name: False})


def test_template_kwargs_are_overridden_on_the_command_line_and_survive_the_runs_own_record(
    monkeypatch,
):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    words = [
        "train",
        "--config=configs/tiny.py",
        "--config.prompt.template_kwargs={'enable_thinking': False, 'tools_in': {'a': [1]}}",
        "--config.prompt.stop=('<|end|>', 3)",
        "--config.prompt.system=Be brief.",
    ]
    monkeypatch.setattr(sys, "argv", words)  # config_flags looks here for overrides
    values(words)
    c = values.config
    assert c.prompt.template_kwargs.to_dict() == {"enable_thinking": False, "tools_in": {"a": [1]}}
    assert c.prompt.stop == ("<|end|>", 3) and c.prompt.system == "Be brief."
    again = config.from_plain(json.loads(json.dumps(config.to_plain(c))))
    assert config.to_plain(again) == config.to_plain(c) and config.digest(again) == config.digest(c)
    assert again.is_locked and again.prompt.is_locked
    c = config.defaults()  # and in a file of configs/
    c.prompt.template_kwargs = {"enable_thinking": False}
    assert c.prompt.template_kwargs.to_dict() == {"enable_thinking": False}
    with pytest.raises(ConfigError, match="another version"):
        config.from_plain({"prompt": {"of_the_future": 1}})


def test_what_the_message_itself_says_about_thinking_opens_nothing():
    tokenizer = chatml_tokenizer(think_tokens=True)
    assert not scaffold_of(tokenizer, search="{problem} Begin with <think>.").opens_thinking
    assert not scaffold_of(tokenizer, search="{problem} Begin with <think>.\n ").opens_thinking


def test_a_chat_template_that_loses_the_message_is_refused():
    with pytest.raises(
        ConfigError, match="config.prompt.search: the chat template changes the message"
    ):
        scaffold_of(chatml_tokenizer(template="<|im_start|>user\nhello<|im_end|>"))


@pytest.mark.parametrize(
    "template", ["{{ messages[7].content }}", "{% if %}", "{{ 1 + messages }}"]
)
def test_a_chat_template_that_fails_is_an_error_with_its_own_words(template):
    with pytest.raises(
        ConfigError, match="config.prompt.search: the chat template refuses the prompt"
    ):
        scaffold_of(chatml_tokenizer(template=template))


# ---- plain text for base models


def test_plain_prompts_are_the_text_itself_behind_the_bos_that_the_tokenizer_begins_with():
    tokenizer = chatml_tokenizer(template=None)
    fields = {
        "template": "plain",
        "search": "Q: {problem} {{}}\nA:",
        "aggregation": "{problem}\n{candidates}A:",
    }
    fields |= {"candidate": "- {candidate}\n"}
    bare = scaffold_of(tokenizer, **fields)
    tokenizer.bos_token = "<|unnamed|>"  # as in SmolLM2: it has a BOS and never uses it
    unused = scaffold_of(tokenizer, **fields)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|unnamed|> $A", None, [("<|unnamed|>", 2)]
    )
    led = scaffold_of(tokenizer, **fields)
    for scaffold, first in ((bare, []), (unused, []), (led, [2])):
        ids = prompts.search_prompt(scaffold, "3 + 4?")
        assert ids.dtype == np.int32 and ids[: len(first)].tolist() == first
        assert decode(tokenizer, ids[len(first) :]) == "Q: 3 + 4? {}\nA:"
        traces = [(encode(tokenizer, text), Stop.STOP) for text in ("7", "8")]
        ids = prompts.aggregation_prompt(scaffold, "3 + 4?", traces, np.array([1, 0])).ids
        assert ids[: len(first)].tolist() == first and 2 not in ids[len(first) :]
        assert decode(tokenizer, ids[len(first) :]) == "3 + 4?\n- 8\n- 7\nA:"


def test_a_plain_prompt_may_open_thinking_itself_in_both_prompts_or_in_neither():
    tokenizer = chatml_tokenizer(template=None)
    fields = {
        "template": "plain",
        "search": "{problem}<think>\n",
        "aggregation": "{candidates}{problem}<think>",
    }
    assert scaffold_of(tokenizer, **fields).opens_thinking
    neither = {"search": "<think>{problem}", "aggregation": "{candidates}{problem}"}
    assert not scaffold_of(tokenizer, **fields | neither).opens_thinking
    with pytest.raises(ConfigError, match="one ends inside <think>"):
        scaffold_of(tokenizer, **fields | {"search": "{problem}"})


def test_a_tokenizer_without_chat_template_is_an_error_that_names_the_way_out(tmp_path):
    chatml_tokenizer(template=None).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=f"in {tmp_path} has no chat template.*prompt.template=plain"
    ):
        scaffold_of(load_tokenizer(tmp_path))
    scaffold_of(load_tokenizer(tmp_path), template="plain")


PLAIN = {"system": "Be brief.", "template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("field", PLAIN)
def test_plain_prompts_have_no_place_for_what_only_a_chat_template_reads(field):
    c = tiny.get_config()
    c.prompt[field] = PLAIN[field]
    check_training(c)
    c.prompt.template = "plain"
    with pytest.raises(ConfigError, match=f"config.prompt.{field} = .*plain"):
        check_training(c)


@pytest.mark.parametrize(
    ("field", "value"),
    [("template", "raw"), ("stop", (1.5,)), ("stop", (True,)), ("stop", (("a",),))],
)
def test_a_bad_value_is_refused(field, value):
    c = tiny.get_config()
    c.prompt[field] = value
    with pytest.raises(ConfigError, match=f"config.prompt.{field} = "):
        check_training(c)


# ---- thinking, from the template through a rollout to what an aggregation prompt shows


@pytest.mark.parametrize("thinking", [True, False])
def test_candidates_of_a_rollout_show_no_thinking_whichever_side_opened_it(thinking):
    """The template opens <think> for the trace, or closes an empty block so that it has none."""
    tokenizer = load_tokenizer(hf.resolve_path("bundled:tiny"))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    open_, empty = "{{ '<|assistant|><think>' }}", "{{ '<|assistant|><think></think>' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|assistant|>' }}",
        f"{{% if enable_thinking %}}{open_}{{% else %}}{empty}{{% endif %}}",
    )
    lead = "left:1\\boxed{1}</think>" if thinking else ""
    traces = [
        f"{lead}right:2\\boxed{{7}}",
        f"{lead}right:3\\boxed{{4}}",
        "left:1\\boxed{7}...",
        f"{lead}right:5",
    ]
    c = scripted_config(
        search__traces=4, search__max_tokens=64, aggregation__subset_size=2, eval__subset_size=4
    )
    c.prompt.template_kwargs = {"enable_thinking": thinking}
    settings = PromptSettings.from_config(c.prompt)
    scaffold = make_scaffold(tokenizer, settings, (tokenizer.eos_token_id,))
    writer = Writer(scaffold, Purpose.TRAIN, 0, c.seed, c.aggregation.order)
    search, aggregation = training_stages(c).stages()
    problem = number_task().train(0)
    asked = Asked(0, problem, search_prompt(scaffold, problem.text))
    sampler = ScriptedSampler(lambda role, cursor, k, i: traces[i])
    found = sample(sampler, None, writer.search(search, asked))
    with math_verifier() as verifier:
        verdicts = verifier.verify([(text, problem) for text in trace_texts(tokenizer, found)])
    rewards = reward(found, verdicts).reward_UxC
    assert rewards[0, :2].tolist() == [1, 0]  # the box behind the thinking counts
    prompt = decode(tokenizer, found.requests.prompt_UxP[0, : found.requests.prompt_len_U[0]])
    assert prompt.endswith("<think>" if thinking else "<think></think>")
    requests, cleaned = writer.aggregation(aggregation, asked, found, np.array([[0, 1, 2, 3]]))
    shown = decode(tokenizer, requests.prompt_UxP[0, : requests.prompt_len_U[0]])
    body = shown.removesuffix(prompt[prompt.index("<|assistant|>") :])
    assert body != shown and "think>" not in body
    # Cut off while thinking: nothing of it is an answer.
    third = "(empty)" if thinking else "left:1\\boxed{7}..."
    listed = ["right:2\\boxed{7}", "right:3\\boxed{4}", third, "right:5"]
    assert sorted(body.removesuffix("<|end|>").split("#")[1:]) == sorted(listed)
    assert cleaned["empty"] == int(thinking) and cleaned["removed_special"] == 0


# ---- tokenizers and stop ids


def test_load_tokenizer_gives_back_the_same_prompts_and_names_what_is_missing(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    ids = [prompts.search_prompt(scaffold_of(t), "3 + <|im_end|> 4?") for t in (tokenizer, loaded)]
    assert np.array_equal(*ids)
    with pytest.raises(ConfigError, match="config.model.hf_path = .*absent.*not a directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="config.model.hf_path = .*bare.*cannot be loaded"):
        load_tokenizer(tmp_path / "bare")


@pytest.mark.parametrize(
    ("named", "expected"), [(7, (7, 1)), ([7, 8], (7, 8, 1)), ([1, 7], (1, 7)), (None, (1,))]
)
def test_stop_ids_come_from_generation_config_and_tokenizer(tmp_path, tokenizer, named, expected):
    # a pad token may end traces: masks are lengths
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    assert stop_ids(tokenizer, tmp_path) == (1,)  # no such file
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert stop_ids(tokenizer, tmp_path) == expected


def test_stop_ids_of_the_model_count_where_generation_config_has_none(tmp_path, tokenizer):
    """As in transformers: a chat model's end of turn may be named in config.json alone."""
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 1]}')
    assert stop_ids(tokenizer, tmp_path) == (7, 1)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert stop_ids(tokenizer, tmp_path) == (7, 1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 8}')
    assert stop_ids(tokenizer, tmp_path) == (8, 1)


def test_stop_ids_of_the_config_join_the_others_once(tmp_path, tokenizer):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert stop_ids(tokenizer, tmp_path, ("<|unnamed|>", 9, "<|im_end|>", 7)) == (
        7,
        1,
        2,
        9,
    )
    scaffold = scaffold_of(tokenizer, more_stop_ids=(7, 2, 9))
    ids, removed = prompts.clean_candidate(scaffold, np.array([5, 9, 6, 9]), Stop.STOP)
    assert ids.tolist() == [5, 6] and removed == 1  # and they are special inside candidates


@pytest.mark.parametrize("stop", ["<|absent|>", "", "two words", 400, -1, 10**12])
def test_a_stop_token_that_is_not_a_single_id_is_an_error_that_names_it(tmp_path, tokenizer, stop):
    with pytest.raises(
        ConfigError, match=r"config\.prompt\.stop has .*must be the text of one token"
    ) as caught:
        stop_ids(tokenizer, tmp_path, ("<|im_end|>", stop))
    assert repr(stop) in str(caught.value)


def test_no_stop_id_at_all_is_an_error_unless_the_config_names_one(tmp_path):
    tokenizer = chatml_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos_token_id.*config.prompt.stop"):
        stop_ids(tokenizer, tmp_path)
    assert stop_ids(tokenizer, tmp_path, ("<|im_end|>",)) == (1,)


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}', "[1]", "{"]
)
def test_a_damaged_generation_config_is_named(tmp_path, tokenizer, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match="generation_config.json: its eos_token_id must be"):
        stop_ids(tokenizer, tmp_path)
