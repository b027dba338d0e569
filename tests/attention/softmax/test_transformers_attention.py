"""Attention and its options against models of transformers that have them."""

import importlib

import numpy as np
import pytest

from attention import (
    DifferentialAttention,
    GroupedQueryAttention,
    LatentAttention,
    RotaryPosition,
)
from tests.helpers import WIDTH, assert_close, band, built, check_outputs, sample, slow
from tests.torch_modules import kernel, numbers, randomized, run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, WINDOW, HEADS, GROUPS, DIM = 20, 6, 4, 2, 8
ROTARY = {"rope_type": "default", "rope_theta": 100.0}
# Settings of all of their configurations.
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "attn_implementation": "eager",
    "rope_parameters": ROTARY,
}


def module_of(name, prefix, layer_index=0, **config):
    """A layer of attention of theirs with random weights, and its rotary embedding."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **config})
    attention = getattr(module, f"{prefix}Attention")(config, layer_index)
    return randomized(attention), getattr(module, f"{prefix}RotaryEmbedding")(config)


def assign(layer, theirs, *parts):
    """Copies the weights of projections, whose names begin alike."""
    for part in parts:
        linear = getattr(theirs, f"{part[0]}_proj")
        values = kernel(linear), *(numbers(x) for x in [linear.bias] if x is not None)
        weights = getattr(layer, f"{part}_dense").weights
        for weight, value in zip(weights, values, strict=True):
            weight.assign(value.reshape(weight.shape))


def check(layer, theirs, rotary, window=None):
    """Theirs with a mask in full, against ours; returns their weights, too."""
    x = sample(batch=2, length=LENGTH)
    mask = np.where(band(LENGTH, window), 0, -1e30)[None, None].astype("float32")
    expected, weights = run(
        theirs,
        x,
        position_embeddings=rotary(torch.from_numpy(x), torch.arange(LENGTH)[None]),
        attention_mask=torch.from_numpy(mask),
    )
    assert np.abs(expected).max() > 0.5
    check_outputs(layer, x, expected, [9, 1, 1, 9], atol=5e-5)
    return x, weights


def made(**options):
    options = {"position": RotaryPosition(100.0), "key_dim": DIM, **options}
    return built(GroupedQueryAttention(HEADS, GROUPS, **options))


windows = pytest.mark.parametrize("window", [WINDOW, None])


def layers_of_both_kinds(window):
    return {
        "layer_index": 0 if window else 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
    }


@windows
def test_sinks_and_windows_of_gpt_oss(window):
    kinds = layers_of_both_kinds(window)
    theirs, rotary = module_of("gpt_oss", "GptOss", attention_bias=True, **kinds)
    layer = made(attention_sinks=True, window=window)
    assign(layer, theirs, "query", "key", "value", "output")
    layer.sinks.assign(numbers(theirs.sinks))
    check(layer, theirs, rotary, window)


@windows
def test_soft_cap_and_windows_of_gemma2(window):
    options = {"query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0}
    kinds = layers_of_both_kinds(window)
    theirs, rotary = module_of("gemma2", "Gemma2", **options, **kinds)
    layer = made(scale=3**-0.5, logit_soft_cap=2.0, window=window, use_bias=False)
    assign(layer, theirs, "query", "key", "value", "output")
    check(layer, theirs, rotary, window)


def test_query_key_norm_output_gate_and_partial_rotary_of_qwen3_next():
    theirs, rotary = module_of(
        "qwen3_next",
        "Qwen3Next",
        layer_types=["full_attention"] * 2,
        rope_parameters={**ROTARY, "partial_rotary_factor": 0.5},
    )
    options = {"query_key_norm": True, "output_gate": True, "use_bias": False}
    layer = made(position=RotaryPosition(100.0, rotary_dim=DIM // 2), **options)
    assign(layer, theirs, "key", "value", "output")
    # Theirs come head by head: the query, then the gate.
    both = kernel(theirs.q_proj).reshape(WIDTH, HEADS, 2, DIM)
    layer.query_dense.kernel.assign(both[:, :, 0])
    layer.gate_dense.kernel.assign(both[:, :, 1])
    # They scale by one more than the weight.
    layer.query_norm.scale.assign(1 + numbers(theirs.q_norm.weight))
    layer.key_norm.scale.assign(1 + numbers(theirs.k_norm.weight))
    check(layer, theirs, rotary)


@windows
@pytest.mark.parametrize("query_latent_dim", [None, 5])
def test_latent_attention_of_deepseek(query_latent_dim, window):
    theirs, rotary = module_of(
        "deepseek_v3",
        "DeepseekV3",
        num_key_value_heads=HEADS,
        head_dim=4,
        q_lora_rank=query_latent_dim,
        kv_lora_rank=7,
        qk_rope_head_dim=4,
        qk_nope_head_dim=3,
        v_head_dim=6,
        rope_interleave=False,
    )
    layer = LatentAttention(
        HEADS,
        key_dim=3,
        value_dim=6,
        latent_dim=7,
        rotary_dim=4,
        query_latent_dim=query_latent_dim,
        position=RotaryPosition(100.0),
        window=window,
    )
    built(layer)
    query = theirs.q_proj
    if query_latent_dim:
        query = theirs.q_b_proj
        layer.query_down.kernel.assign(kernel(theirs.q_a_proj))
        layer.query_norm.scale.assign(numbers(theirs.q_a_layernorm.weight))
    layer.query_dense.kernel.assign(kernel(query).reshape(-1, HEADS, 7))
    down = kernel(theirs.kv_a_proj_with_mqa)
    layer.latent_dense.kernel.assign(down[:, :7])
    layer.rotary_key_dense.kernel.assign(down[:, 7:])
    layer.latent_norm.scale.assign(numbers(theirs.kv_a_layernorm.weight))
    up = kernel(theirs.kv_b_proj).reshape(7, HEADS, 9)
    layer.key_up.assign(up[..., :3].transpose(1, 2, 0))
    layer.value_up.assign(up[..., 3:].transpose(1, 0, 2))
    assign(layer, theirs, "output")
    check(layer, theirs, rotary, window)
    cache = layer.create_cache(2, 50)
    assert {k: tuple(v.shape) for k, v in cache.items()} == {
        "latent": (2, 1, window or 50, 7 + 4)
    }


@pytest.mark.parametrize("groups", [slow(4), 2])
def test_differential_attention_of_diffllama(groups):
    theirs, rotary = module_of(
        "diffllama", "DiffLlama", 1, num_key_value_heads=groups, rms_norm_eps=1e-5
    )
    layer = DifferentialAttention(
        HEADS // 2,
        groups // 2,
        lambda_init=theirs.lambda_init,
        position=RotaryPosition(100.0),
        key_dim=DIM,
        use_bias=False,
    )
    built(layer)
    for part in ("query", "key", "value"):
        # Theirs have the first of each pair in front of all the second ones.
        paired = kernel(getattr(theirs, f"{part[0]}_proj")).reshape(WIDTH, 2, -1, DIM)
        weight = getattr(layer, f"{part}_dense").kernel
        weight.assign(paired.swapaxes(1, 2).reshape(weight.shape))
    assign(layer, theirs, "output")
    vectors = np.array(
        [[numbers(getattr(theirs, f"lambda_{x}{i}")) for x in "qk"] for i in (1, 2)]
    )
    layer.lambdas.assign(vectors)
    layer.head_norm.scale.assign(np.ones(2 * DIM))
    x, weights = check(layer, theirs, rotary)
    _, scores = layer(x, return_attention_scores=True)
    products = np.exp((vectors[:, 0] * vectors[:, 1]).sum(axis=-1))
    weight = products[0] - products[1] + theirs.lambda_init
    assert_close(scores, weights[:, :2] - weight * weights[:, 2:])
