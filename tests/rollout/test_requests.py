"""What a stage asks the sampler for: prompts of sampled ids, and the names of random keys."""

import dataclasses

import numpy as np
from scripted_sampler import (
    TOKENIZER,
    ScriptedSampler,
    asked,
    scripted_config,
    scripted_writer,
)

from spiral_jax.core.groups import Purpose, Role
from spiral_jax.prompts.prompts import listed_order
from spiral_jax.rollout.stages import Stage

SEARCH = Stage("search", 0, traces=8, max_tokens=32)
READER = Stage("aggregation/2", 2, traces=3, max_tokens=12, reads=SEARCH)
MEMBER = np.array([[0, 1, 2, 5], [2, 3, 4, 7]])


def search_group(writer, cursor):
    def script(role, cursor, k, i):
        return f"trace {i} of {cursor} \\boxed{{{i}}}"

    return ScriptedSampler(script).write(writer.search(SEARCH, asked(cursor)))


def test_a_search_group_is_the_problems_prompt_under_its_own_name():
    writer = scripted_writer(scripted_config(), Purpose.EVALUATION, step=6)
    requests = writer.search(SEARCH, asked(4))
    np.testing.assert_array_equal(requests.prompt_UxP[0], asked(4).prompt_P)
    assert requests.prompt_len_U.tolist() == [len(asked(4).prompt_P)]
    assert requests.id_Ux6.tolist() == [[Purpose.EVALUATION, 6, 4, 0, Role.SEARCH, 0]]
    assert (requests.traces, requests.max_tokens) == (8, 32)


def test_aggregation_prompts_hold_the_sampled_ids_of_their_sets_in_the_keyed_order():
    c = scripted_config()
    writer = scripted_writer(c, Purpose.TRAIN, step=6)
    marker = TOKENIZER.encode("#", add_special_tokens=False)
    for cursor in (3, 4):
        group = search_group(writer, cursor)
        requests, cleaned = writer.aggregation(READER, asked(cursor), group, MEMBER)
        assert (len(requests), requests.traces, requests.max_tokens) == (2, 3, 12)
        for k, member_S in enumerate(MEMBER):
            id_6 = requests.id_Ux6[k]
            assert id_6.tolist() == [Purpose.TRAIN, 6, cursor, 2, Role.AGGREGATION, k]
            expected = []
            for n in member_S[listed_order("shuffled", c.seed, id_6, 4)]:
                expected += [*marker, *group.trace_ids(0, n)[:-1]]
            prompt = requests.prompt_UxP[k, : requests.prompt_len_U[k]].tolist()
            behind = len(prompt) - 2  # <|end|><|assistant|>
            assert prompt[behind - len(expected) : behind] == expected
        assert cleaned["candidates"] == MEMBER.size and cleaned["removed_special"] == 0


def test_the_candidates_of_a_problem_stand_in_fences_where_the_scaffold_says_so():
    writer = scripted_writer(scripted_config(), Purpose.TRAIN, step=6)
    scaffold = dataclasses.replace(
        writer.scaffold, fences=lambda problem: problem.id == asked(3).problem.id
    )
    writer = dataclasses.replace(writer, scaffold=scaffold)
    for cursor, fences in ((3, 8), (4, 0)):
        group = search_group(writer, cursor)
        requests, _ = writer.aggregation(READER, asked(cursor), group, MEMBER[:1])
        text = TOKENIZER.decode(requests.prompt_UxP[0, : requests.prompt_len_U[0]].tolist())
        assert text.count("```") == fences
