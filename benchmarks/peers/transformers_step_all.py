"""The same step with the logits of all positions, as a plain call of the model computes them."""

from __future__ import annotations

from benchmarks.peers.contestant import serve
from benchmarks.peers.transformers_step import TransformersStep


class TransformersStepAll(TransformersStep):
    response_logits = False


if __name__ == "__main__":
    serve(TransformersStepAll())
