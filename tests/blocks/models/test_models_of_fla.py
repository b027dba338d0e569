"""Architectures that transformers lacks, beside their papers' formulas in NumPy.

The folders are as the flash-linear-attention library writes them.
"""

import json

import keras
import numpy as np
import pytest

from blocks import CausalLM
from tests.blocks.models.checks import VOCABULARY_SIZE, check_greedy, check_logits
from tests.helpers import rms_norm, rotate

safetensors = pytest.importorskip("safetensors.numpy")

WIDTH, HEADS, INNER = 24, 4, 32


def layer_norm(x, weights, name, epsilon=1e-5):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def block_of(weights, i):
    """Returns the weights of a block, without its part of their names."""
    prefix = f"model.layers.{i}."
    found = (name for name in weights if name.startswith(prefix))
    return {name.removeprefix(prefix): weights[name] for name in found}


# === RWKV-7 ===


def rwkv7_tensors(layers=2):
    """Returns shapes by name."""
    vectors = ["attn.k_k", "attn.k_a", "ffn.x_k", "attn.g_norm.weight"]
    vectors += ["attn_norm.weight", "ffn_norm.weight"]
    vectors += ["attn.g_norm.bias", "attn_norm.bias", "ffn_norm.bias"]
    shapes = {"model.embeddings.weight": (VOCABULARY_SIZE, WIDTH)}
    shapes["lm_head.weight"] = (VOCABULARY_SIZE, WIDTH)
    for i in range(layers):
        block = dict.fromkeys(vectors, (WIDTH,))
        block["attn.r_k"] = (HEADS, WIDTH // HEADS)
        for x in "rwkvag":
            block[f"attn.x_{x}"] = (1, 1, WIDTH)
        for x in "rkvo":
            block[f"attn.{x}_proj.weight"] = (WIDTH, WIDTH)
        for x, rank in {"w": 3, "a": 4, "g": 6, **({"v": 5} if i else {})}.items():
            block[f"attn.{x}_lora.lora.0.weight"] = (rank, WIDTH)
            block[f"attn.{x}_lora.lora.2.weight"] = (WIDTH, rank)
            if x != "g":
                block[f"attn.{x}_lora.lora.2.bias"] = (WIDTH,)
        block["ffn.key.weight"] = (INNER, WIDTH)
        block["ffn.value.weight"] = (WIDTH, INNER)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    for name in ["model.norm", "model.layers.0.pre_norm"]:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (WIDTH,)
    return shapes


RWKV7 = {
    "model_type": "rwkv7",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": WIDTH,
    "head_dim": WIDTH // HEADS,
    "num_heads": 32,
    "num_hidden_layers": 2,
    "intermediate_size": None,
    "hidden_ratio": 1.2,
    "decay_low_rank_dim": 3,
    "a_low_rank_dim": 4,
    "v_low_rank_dim": 5,
    "gate_low_rank_dim": 6,
    "value_dim": [WIDTH, WIDTH],
}


def rwkv7(weights, config, tokens):
    """Returns logits, by the recurrence of https://arxiv.org/abs/2503.14456."""
    x = weights["model.embeddings.weight"][tokens]
    x = layer_norm(x, weights, "model.layers.0.pre_norm")
    first = None
    for i in range(config["num_hidden_layers"]):
        block = block_of(weights, i)
        mixed, first = rwkv7_time_mix(block, layer_norm(x, block, "attn_norm"), first)
        x = x + mixed
        normal = layer_norm(x, block, "ffn_norm")
        key = shifted(normal, block["ffn.x_k"]) @ block["ffn.key.weight"].T
        x = x + np.maximum(key, 0) ** 2 @ block["ffn.value.weight"].T
    return layer_norm(x, weights, "model.norm") @ weights["lm_head.weight"].T


def shifted(x, share):
    return x + (np.concatenate([np.zeros_like(x[:1]), x[:-1]]) - x) * share


def rwkv7_time_mix(block, x, first):
    r, w, k, v, a, g = (shifted(x, block[f"attn.x_{name}"][0]) for name in "rwkvag")

    def lora(name, x, activation=lambda x: x):
        low = f"attn.{name}_lora.lora"
        x = activation(x @ block[f"{low}.0.weight"].T) @ block[f"{low}.2.weight"].T
        return x + block.get(f"{low}.2.bias", 0)

    receptance, key, value = (
        y @ block[f"attn.{name}_proj.weight"].T for name, y in zip("rkv", (r, k, v))
    )
    decay = np.exp(-np.exp(-0.5) * sigmoid(lora("w", w, np.tanh)))
    rate, gate = sigmoid(lora("a", a)), lora("g", g, sigmoid)
    if first is None:
        first = value
    else:
        value = value + (first - value) * sigmoid(lora("v", v))
    heads = (len(x), HEADS, -1)
    unit = (key * block["attn.k_k"]).reshape(heads)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    key = key * (1 + (rate - 1) * block["attn.k_a"])
    receptance, key, values, decay, rate = (
        y.reshape(heads) for y in (receptance, key, value, decay, rate)
    )
    state = np.zeros((HEADS, WIDTH // HEADS, WIDTH // HEADS))  # values by keys
    found = np.zeros_like(values)
    for t in range(len(x)):
        read = np.einsum("hvk,hk->hv", state, unit[t])
        state = state * decay[t, :, None]
        state = state - read[:, :, None] * (unit[t] * rate[t])[:, None]
        state = state + values[t, :, :, None] * key[t, :, None]
        found[t] = np.einsum("hvk,hk->hv", state, receptance[t])
    names = ("attn.g_norm.weight", "attn.g_norm.bias")
    norm = {name: block[name].reshape(heads[1:]) for name in names}
    outputs = layer_norm(found, norm, "attn.g_norm", 1e-5 * WIDTH / HEADS)
    bonus = (receptance * key * block["attn.r_k"]).sum(-1, keepdims=True) * values
    outputs = (outputs + bonus).reshape(x.shape) * gate
    return outputs @ block["attn.o_proj.weight"].T, first


# === RetNet ===

RETNET = {
    "model_type": "retnet",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_heads": HEADS,
    "intermediate_size": INNER,
    "expand_k": 2 / 3,
    "expand_v": 1.5,
    "norm_eps": 1e-3,
    "tie_word_embeddings": True,
}


def retnet_tensors():
    """Returns shapes by name."""
    shapes = {"model.embeddings.weight": (VOCABULARY_SIZE, WIDTH)}
    keys, values = WIDTH * 2 // 3, WIDTH * 3 // 2
    block = {
        "attn_norm.weight": (WIDTH,),
        "attn.q_proj.weight": (keys, WIDTH),
        "attn.k_proj.weight": (keys, WIDTH),
        "attn.v_proj.weight": (values, WIDTH),
        "attn.g_proj.weight": (values, WIDTH),
        "attn.g_norm_swish_gate.weight": (values // HEADS,),
        "attn.o_proj.weight": (WIDTH, values),
        "mlp_norm.weight": (WIDTH,),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
    }
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return {**shapes, "model.norm.weight": (WIDTH,)}


def retnet(weights, config, tokens):
    """Returns logits, by the parallel form of https://arxiv.org/abs/2307.08621."""
    x, epsilon = weights["model.embeddings.weight"][tokens], config["norm_eps"]
    distance = np.arange(len(x))[:, None] - np.arange(len(x))
    decays = 1 - 2.0 ** (-5 - np.arange(HEADS))[:, None, None]
    decays = np.where(distance >= 0, decays ** np.maximum(distance, 0), 0)  # (h, q, k)
    for i in range(config["num_hidden_layers"]):
        block = block_of(weights, i)
        normal = rms_norm(x, block["attn_norm.weight"], epsilon)
        query, key, value, gate = (
            normal @ block[f"attn.{name}_proj.weight"].T for name in "qkvg"
        )
        query, key, value = (y.reshape(len(x), HEADS, -1) for y in (query, key, value))
        query, key = rotate(query) / query.shape[-1] ** 0.5, rotate(key)
        scores = np.einsum("qhd,khd->hqk", query, key) * decays
        heads = np.einsum("hqk,khd->qhd", scores, value)
        heads = rms_norm(heads, block["attn.g_norm_swish_gate.weight"], epsilon)
        heads = heads.reshape(gate.shape) * gate * sigmoid(gate)
        x = x + heads @ block["attn.o_proj.weight"].T
        normal = rms_norm(x, block["mlp_norm.weight"], epsilon)
        gate, inner = (
            normal @ block[f"mlp.{name}_proj.weight"].T for name in ("gate", "up")
        )
        x = x + (gate * sigmoid(gate) * inner) @ block["mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    return x @ weights["model.embeddings.weight"].T


def drawn(shapes):
    """Returns random tensors, of which vectors are near 1/2."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = rng.normal(size=shape)
        if len(shape) == 1 or shape[0] == 1:
            tensors[name] = 0.5 + 0.3 * noise
        else:
            tensors[name] = noise / shape[-1] ** 0.5
    return {name: x.astype("float32") for name, x in tensors.items()}


# Each is a configuration, shapes of tensors, and a reference.
CASES = {
    "rwkv7": (RWKV7, rwkv7_tensors(), rwkv7),
    "retnet": (RETNET, retnet_tensors(), retnet),
}


@pytest.fixture(params=CASES.values(), ids=CASES, scope="module")
def models(request, tmp_path_factory):
    config, shapes, reference = request.param
    tensors = drawn(shapes)
    folder = tmp_path_factory.mktemp(config["model_type"])
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, folder / "model.safetensors")
    weights = {name: x.astype("float64") for name, x in tensors.items()}
    return (
        lambda row: reference(weights, config, row),
        CausalLM.from_preset(str(folder)),
    )


@pytest.mark.slow
def test_logits_through_padding_and_a_cache(models):
    expected_logits, lm = models
    check_logits(lm, expected_logits)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="compiles elsewhere")
def test_greedy_tokens_and_no_export(models, tmp_path):
    expected_logits, lm = models
    check_greedy(lm, expected_logits)
    with pytest.raises(ValueError, match="transformers has no model"):
        lm.export_to_transformers(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
