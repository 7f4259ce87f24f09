"""The configs of other families than the paper's: valid, and planned for one host of 8 H100."""

import jax
import pytest

from configs import llama32_1b, qwen3_30b_a3b, qwen25_1_5b
from spiral_jax.learner.state import abstract_state
from spiral_jax.planning.gpus import missing_compiler
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.text import plan
from spiral_jax.planning.work import Assumptions
from spiral_jax.run.setup import check_training

# config -> parameters, of adapters at rank 32
CONFIGS = {
    qwen25_1_5b: (1_543_714_304, 36_929_536),
    llama32_1b: (1_235_814_400, 22_544_384),
    qwen3_30b_a3b: (30_532_122_624, 26_738_688),
}


@pytest.fixture(params=CONFIGS, ids=lambda module: module.__name__)
def module(request):
    return request.param


def test_config_is_valid_and_adapters_have_their_number_of_parameters(module, mesh):
    c = module.get_config()
    model, _ = planned_model(c.model)
    learner = check_training(c).training.learner
    trained = abstract_state(learner, model, mesh).trained
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert (model.arch.parameters, count) == CONFIGS[module]


def test_every_longest_prompt_has_room(module):
    c = module.get_config()
    training = check_training(c).training
    for stage in training.stages.stages():
        longest = 1024 + (stage.set_size * stage.reads.max_tokens if stage.reads else 0)
        P, G = training.learner.shapes[stage.role].lengths[-1]
        assert longest <= P and stage.max_tokens <= G


@pytest.mark.skipif(
    missing_compiler() is None, reason="jax's CUDA plugin is installed: compiling takes minutes"
)
def test_it_fits_eight_h100_as_configured(module):
    c = module.get_config()
    report = plan(c, "h100:8", Assumptions(), free=0.1, most_tries=1, say=lambda text: None)
    assert report["tried"] == [{"change": "", "verdict": "fits"}]
