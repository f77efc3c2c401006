"""Wirings of networks of the `transformers` library, small and with random weights."""

import copy
from dataclasses import dataclass, field
from functools import cache
from math import factorial
from typing import Any

import pytest
import torch
import transformers
from properties import changes_alone, difference, in_float64, outputs, randomized, times_placed

from ngcore.graph import trace

TOKENS = torch.randint(60, (2, 5), generator=torch.Generator().manual_seed(0))
WORDS = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def image(size):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@dataclass
class Network:
    """A model's class and configuration, and its example inputs.

    `without_effect` ends the names of parameters that softmax makes ineffective; `tolerance` is wider where the library
    computes in float32.
    """

    model: str
    config: dict[str, Any]
    inputs: torch.Tensor = TOKENS
    keywords: dict[str, Any] = field(default_factory=dict)
    without_effect: str = "never"
    tolerance: float = 1e-9


NO_CACHE = {"use_cache": False}
LLAMA = {
    **WORDS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20,
    "max_position_embeddings": 16,
}  # fmt: skip
NETWORKS = {
    "GPT-2": Network(
        "GPT2LMHeadModel", {**WORDS, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 20},
        keywords=NO_CACHE,
    ),
    "BERT": Network(
        "BertForSequenceClassification",
        {**WORDS, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20,
         "max_position_embeddings": 16},
        without_effect="key.bias",
    ),
    "LLaMA": Network("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 2}, keywords=NO_CACHE, tolerance=1e-5),
    "Qwen3": Network(
        "Qwen3ForCausalLM", {**LLAMA, "num_hidden_layers": 1, "head_dim": 8}, keywords=NO_CACHE, tolerance=1e-5
    ),
    "T5": Network(
        "T5ForConditionalGeneration",
        {**WORDS, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 20, "d_kv": 4, "decoder_start_token_id": 0},
        keywords={"decoder_input_ids": TOKENS, **NO_CACHE},
    ),
    "ViT": Network(
        "ViTForImageClassification",
        {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20,
         "image_size": 20, "patch_size": 5},
        image(20), without_effect="k_proj.bias",
    ),
    "ResNet": Network(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic", "hidden_act": "tanh"},
        image(33),
    ),
    "Swin": Network(
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4},
        image(16), without_effect="k_proj.bias",
    ),
    "ConvNeXt": Network(
        "ConvNextForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}, image(32)
    ),
}  # fmt: skip


@cache
def traced(name):
    """The network in float64, its inputs, and its wiring."""
    network = NETWORKS[name]
    model = getattr(transformers, network.model)
    module = randomized(model(model.config_class(**network.config)))
    inputs = in_float64([network.inputs])
    return module, inputs, trace(module, *inputs, **network.keywords)


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def test_the_inverse_is_exact_also_for_a_batch(name):
    module, _, wiring = traced(name)
    state = module.state_dict()
    for expected in (state, {key: torch.stack([values, values + 1]) for key, values in state.items()}):
        back = wiring.graph(expected).state_dict()
        assert set(back) == set(expected)
        assert all(torch.equal(back[key], values) for key, values in expected.items())


def test_every_element_of_every_parameter_has_one_place(name):
    _, _, wiring = traced(name)
    assert set(wiring.shapes) == {key for key, _ in traced(name)[0].named_parameters()}
    assert all((count == 1).all() for count in times_placed(wiring).values())


def test_symmetries_keep_the_outputs(name, generator):
    module, inputs, wiring = traced(name)
    keywords, state = NETWORKS[name].keywords, copy.deepcopy(module.state_dict())
    moved = wiring.symmetry.permute(state, wiring.symmetry.random(generator))
    assert wiring.symmetry.order > 10**6
    assert not wiring.symmetry.given_up
    assert not all(torch.equal(moved[key], values) for key, values in state.items())
    expected, found = (outputs(module, weights, inputs, keywords) for weights in (state, moved))
    module.load_state_dict(state)
    assert difference(expected, found) < NETWORKS[name].tolerance


def test_no_parameter_may_be_permuted_alone(name):
    module, inputs, wiring = traced(name)
    network = NETWORKS[name]
    changes = changes_alone(module, wiring, inputs, network.keywords)
    assert {i for _, i in changes} == set(range(len(wiring.symmetry.factors)))
    for (parameter, factor), change in changes.items():
        ineffective = parameter.endswith(network.without_effect)
        assert (change < network.tolerance) == ineffective, (parameter, factor, change)


def test_the_group_of_gpt2():
    layer = factorial(3) * (factorial(8) * factorial(8)) ** 3 * factorial(20)  # heads, query-key and value dimensions
    assert traced("GPT-2")[2].symmetry.order == factorial(24) * layer**2  # the residual stream is one


def test_the_group_of_llama():
    """Rotary positions pin what queries and keys share; query heads stay with their key-value head."""
    layer = factorial(2) * factorial(2) ** 2 * factorial(8) ** 2 * factorial(20)
    assert traced("LLaMA")[2].symmetry.order == factorial(32) * layer**2
