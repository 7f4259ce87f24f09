"""A softmax policy of three outcomes: every expectation over its traces is a finite sum."""

import itertools

import numpy as np

THETA = np.array([0.3, -0.5, 0.4])
POLICY = np.exp(THETA) / np.exp(THETA).sum()


def tuples_and_probability(count):
    """Every tuple of so many outcomes [.., count], and its probability."""
    tuples = np.array(list(itertools.product(range(3), repeat=count)))
    return tuples, POLICY[tuples].prod(axis=1)


def arbitrary_set_function(s, seed):
    """A random number for each multiset of S outcomes: symmetric, with no order among outcomes."""
    rng = np.random.default_rng(seed)
    multisets = itertools.combinations_with_replacement(range(3), s)
    table = {multiset: rng.random() for multiset in multisets}

    def value(rows):
        values = np.array([table[tuple(sorted(row))] for row in rows.reshape(-1, s)])
        return values.reshape(rows.shape[:-1])

    return value


def score_gradient(outcome):
    """grad log pi of a softmax policy: one-hot minus probabilities."""
    return np.eye(3)[outcome] - POLICY
