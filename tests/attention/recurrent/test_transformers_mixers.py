"""Mixers against transformers' implementations, with the same weights."""

import numpy as np
import pytest

from attention import (
    DifferentialAttention,
    GatedDeltaNet,
    LatentAttention,
    Mamba2,
    RotaryPosition,
)
from tests.helpers import WIDTH, assert_close, called, run_chunks, sample
from tests.torch_modules import kernel, numbers, randomized

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 70


def check(layer, x, expected, atol=1e-4):
    assert_close(called(layer)(x), expected, atol)
    outputs, _ = run_chunks(layer, x, [66, 1, 1, 2], ("int", "rows"), capacity=LENGTH)
    assert_close(outputs, expected, atol)


def run(module, x, **kwargs):
    with torch.no_grad():
        outputs = module(torch.from_numpy(x), **kwargs)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    return outputs.numpy()


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        num_heads=4,
        head_dim=8,
        hidden_size=WIDTH,
        state_size=6,
        n_groups=groups,
        expand=2,
        num_hidden_layers=1,
        chunk_size=16,
    )
    theirs = randomized(Mamba2Mixer(config, 0))
    layer = Mamba2(4, state_dim=6, num_groups=groups)
    layer.build((None, None, WIDTH))
    layer.input_dense.kernel.assign(kernel(theirs.in_proj))
    layer.output_dense.kernel.assign(kernel(theirs.out_proj))
    layer.convolution.kernel.assign(numbers(theirs.conv1d.weight)[:, 0].T)
    pairs = [
        (layer.convolution.bias, theirs.conv1d.bias),
        (layer.log_rate, theirs.A_log),
        (layer.step_bias, theirs.dt_bias),
        (layer.skip, theirs.D),
        (layer.norm_scale, theirs.norm.weight),
    ]
    for ours, value in pairs:
        ours.assign(numbers(value))
    x = sample(batch=2, length=LENGTH)
    check(layer, x, run(theirs, x))


@pytest.mark.parametrize("key_heads", [2, 4])
def test_gated_delta_net(key_heads):
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        Qwen3NextGatedDeltaNet,
    )

    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        linear_num_value_heads=4,
        linear_num_key_heads=key_heads,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=4,
        layer_types=["linear_attention"],
    )
    theirs = randomized(Qwen3NextGatedDeltaNet(config, 0))
    layer = GatedDeltaNet(4, key_heads, key_dim=3, value_dim=5)
    layer.build((None, None, WIDTH))
    # Theirs are ordered by key heads: query, key, values and gates of each.
    per_head = 4 // key_heads
    mixed = kernel(theirs.in_proj_qkvz).reshape(WIDTH, key_heads, -1)
    cuts = np.cumsum([3, 3, 5 * per_head])
    parts = [x.reshape(WIDTH, -1) for x in np.split(mixed, cuts, axis=-1)]
    layer.query_key_value.kernel.assign(np.concatenate(parts[:3], axis=-1))
    layer.gate_dense.kernel.assign(parts[3])
    small = kernel(theirs.in_proj_ba).reshape(WIDTH, key_heads, 2, per_head)
    layer.beta_dense.kernel.assign(small[:, :, 0].reshape(WIDTH, 4))
    layer.decay_dense.kernel.assign(small[:, :, 1].reshape(WIDTH, 4))
    layer.convolution.kernel.assign(numbers(theirs.conv1d.weight)[:, 0].T)
    layer.log_rate.assign(numbers(theirs.A_log))
    layer.decay_bias.assign(numbers(theirs.dt_bias))
    layer.head_norm.scale.assign(numbers(theirs.norm.weight))
    layer.output_dense.kernel.assign(kernel(theirs.out_proj))
    x = sample(batch=2, length=LENGTH)
    check(layer, x, run(theirs, x))


def run_causal(attention, rotary, x):
    """Their attention, with their rotary embedding and a causal mask."""
    positions = torch.arange(x.shape[1])[None]
    mask = torch.full((1, 1, x.shape[1], x.shape[1]), -1e30).triu(1)
    embeddings = rotary(torch.from_numpy(x), positions)
    return run(attention, x, position_embeddings=embeddings, attention_mask=mask)


@pytest.mark.parametrize("query_latent_dim", [None, 5])
def test_latent_attention(query_latent_dim):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = transformers.DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=query_latent_dim,
        kv_lora_rank=7,
        qk_rope_head_dim=4,
        qk_nope_head_dim=3,
        v_head_dim=6,
        rope_interleave=False,
        attn_implementation="eager",
    )
    theirs = randomized(deepseek.DeepseekV3Attention(config, 0))
    layer = LatentAttention(
        4,
        key_dim=3,
        value_dim=6,
        latent_dim=7,
        rotary_dim=4,
        query_latent_dim=query_latent_dim,
    )
    layer.build((None, None, WIDTH))
    query = theirs.q_proj
    if query_latent_dim:
        query = theirs.q_b_proj
        layer.query_down.kernel.assign(kernel(theirs.q_a_proj))
        layer.query_norm.scale.assign(numbers(theirs.q_a_layernorm.weight))
    layer.query_dense.kernel.assign(kernel(query).reshape(-1, 4, 7))
    down = kernel(theirs.kv_a_proj_with_mqa)
    layer.latent_dense.kernel.assign(down[:, :7])
    layer.rotary_key_dense.kernel.assign(down[:, 7:])
    layer.latent_norm.scale.assign(numbers(theirs.kv_a_layernorm.weight))
    up = kernel(theirs.kv_b_proj).reshape(7, 4, 9)
    layer.key_up.assign(up[..., :3].transpose(1, 2, 0))
    layer.value_up.assign(up[..., 3:].transpose(1, 0, 2))
    layer.output_dense.kernel.assign(kernel(theirs.o_proj).reshape(4, 6, WIDTH))
    x = sample(batch=2, length=LENGTH)
    check(layer, x, run_causal(theirs, deepseek.DeepseekV3RotaryEmbedding(config), x))


def test_differential_attention():
    from transformers.models.diffllama import modeling_diffllama as diffllama

    config = transformers.DiffLlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    theirs = randomized(diffllama.DiffLlamaAttention(config, 1))
    layer = DifferentialAttention(
        2,
        lambda_init=theirs.lambda_init,
        position=RotaryPosition(),
        use_bias=False,
    )
    layer.build((None, None, WIDTH))

    def paired(module):
        """Heads 0, 1, 2, 3 as theirs are: the first of each two in front."""
        return kernel(module).reshape(WIDTH, 2, 2, 4).swapaxes(1, 2)

    for name, module in (("query", theirs.q_proj), ("key", theirs.k_proj)):
        dense = getattr(layer, f"{name}_dense")
        dense.kernel.assign(paired(module).reshape(WIDTH, 4, 4))
    layer.value_dense.kernel.assign(paired(theirs.v_proj).reshape(WIDTH, 2, 8))
    vectors = [
        [numbers(getattr(theirs, f"lambda_{x}{i}")) for x in "qk"] for i in (1, 2)
    ]
    layer.lambdas.assign(np.array(vectors))
    layer.output_dense.kernel.assign(kernel(theirs.o_proj).reshape(2, 8, WIDTH))
    x = sample(batch=2, length=LENGTH)
    check(layer, x, run_causal(theirs, diffllama.DiffLlamaRotaryEmbedding(config), x))
