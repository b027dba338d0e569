"""Options of attention against models of transformers that have them."""

import importlib

import numpy as np
import pytest

from attention import GroupedQueryAttention, RotaryPosition
from tests.helpers import WIDTH, assert_close, called, run_chunks, sample
from tests.torch_modules import kernel, numbers, randomized

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, WINDOW, HEADS, GROUPS, DIM = 20, 6, 4, 2, 8
# Settings of all of their configurations.
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "attn_implementation": "eager",
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LAYER_TYPES = ["sliding_attention", "full_attention"]


def module_of(name, prefix, layer_index, **config):
    """A layer of attention of theirs with random weights, and its rotary embedding."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **config})
    attention = getattr(module, f"{prefix}Attention")(config, layer_index)
    return randomized(attention), getattr(module, f"{prefix}RotaryEmbedding")(config)


def assign(layer, theirs, parts=("query", "key", "value")):
    for part in parts:
        dense, linear = (
            getattr(layer, f"{part}_dense"),
            getattr(theirs, f"{part[0]}_proj"),
        )
        dense.kernel.assign(kernel(linear).reshape(dense.kernel.shape))
        if layer.use_bias:
            dense.bias.assign(numbers(linear.bias).reshape(dense.bias.shape))
    output = layer.output_dense
    output.kernel.assign(kernel(theirs.o_proj).reshape(output.kernel.shape))
    if layer.use_bias:
        output.bias.assign(numbers(theirs.o_proj.bias))


def check(layer, theirs, rotary, window=None):
    """Theirs with a mask in full, against ours without a cache and in chunks."""
    x = sample(batch=2, length=LENGTH)
    positions = torch.arange(LENGTH)
    distances = positions[:, None] - positions[None]
    hidden = distances < 0
    if window is not None:
        hidden |= distances >= window
    mask = torch.where(hidden, -1e30, 0.0)[None, None]
    with torch.no_grad():
        tensor = torch.from_numpy(x)
        embeddings = rotary(tensor, positions[None])
        expected, _ = theirs(
            tensor, position_embeddings=embeddings, attention_mask=mask
        )
    expected = expected.numpy()
    assert np.abs(expected).max() > 0.5
    assert_close(called(layer)(x), expected)
    outputs, _ = run_chunks(layer, x, [9, 1, 1, 9], ("int", "rows"), capacity=LENGTH)
    assert_close(outputs, expected)


def made(**options):
    options = {"position": RotaryPosition(100.0), "key_dim": DIM, **options}
    layer = GroupedQueryAttention(HEADS, GROUPS, **options)
    layer.build((None, None, WIDTH))
    return layer


both_kinds = pytest.mark.parametrize("layer_index", [0, 1], ids=LAYER_TYPES)


@both_kinds
def test_sinks_and_windows_of_gpt_oss(layer_index):
    window = None if layer_index else WINDOW
    theirs, rotary = module_of(
        "gpt_oss",
        "GptOss",
        layer_index,
        layer_types=LAYER_TYPES,
        sliding_window=WINDOW,
        attention_bias=True,
    )
    layer = made(attention_sinks=True, window=window)
    assign(layer, theirs)
    layer.sinks.assign(numbers(theirs.sinks))
    check(layer, theirs, rotary, window)


@both_kinds
def test_soft_cap_and_windows_of_gemma2(layer_index):
    window = None if layer_index else WINDOW
    theirs, rotary = module_of(
        "gemma2",
        "Gemma2",
        layer_index,
        layer_types=LAYER_TYPES,
        sliding_window=WINDOW,
        query_pre_attn_scalar=3,
        attn_logit_softcapping=2.0,
    )
    layer = made(scale=3**-0.5, logit_soft_cap=2.0, window=window, use_bias=False)
    assign(layer, theirs)
    check(layer, theirs, rotary, window)


def test_query_key_norm_of_qwen3():
    theirs, rotary = module_of("qwen3", "Qwen3", 0)
    layer = made(query_key_norm=True, use_bias=False)
    assign(layer, theirs)
    layer.query_norm.scale.assign(numbers(theirs.q_norm.weight))
    layer.key_norm.scale.assign(numbers(theirs.k_norm.weight))
    check(layer, theirs, rotary)


def test_output_gate_and_partial_rotary_of_qwen3_next():
    theirs, rotary = module_of(
        "qwen3_next",
        "Qwen3Next",
        0,
        layer_types=["full_attention"] * 2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    )
    position = RotaryPosition(100.0, rotary_dim=DIM // 2)
    layer = made(
        query_key_norm=True, output_gate=True, use_bias=False, position=position
    )
    assign(layer, theirs, ("key", "value"))
    # Theirs come head by head: the query, then the gate.
    both = kernel(theirs.q_proj).reshape(WIDTH, HEADS, 2, DIM)
    layer.query_dense.kernel.assign(both[:, :, 0])
    layer.gate_dense.kernel.assign(both[:, :, 1])
    # They scale by one more than the weight.
    layer.query_norm.scale.assign(1 + numbers(theirs.q_norm.weight))
    layer.key_norm.scale.assign(1 + numbers(theirs.k_norm.weight))
    check(layer, theirs, rotary)
