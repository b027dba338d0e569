"""Random weights that all libraries load, under the names of each."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

# Names are those of `blocks.CustomBackbone`; here are KerasHub's for parts of a block.
KERAS_HUB_NAMES = {
    "gpt2": {
        "attention_norm": "self_attention_layer_norm",
        "ffn/intermediate": "feedforward_intermediate_dense",
        "ffn/output": "feedforward_output_dense",
        "ffn_norm": "feedforward_layer_norm",
    },
    "llama": {
        "attention_norm": "self_attention_layernorm",
        "ffn/intermediate": "feedforward_intermediate_dense",
        "ffn/gate": "feedforward_gate_dense",
        "ffn/output": "feedforward_output_dense",
        "ffn_norm": "feedforward_layernorm",
    },
}


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a model.

    Attributes:
        name: the name in reports.
        kind: `"gpt2"` or `"llama"`.
        num_layers: the number of blocks.
        hidden_dim: the width.
        num_heads: the number of query heads.
        num_key_value_heads: the number of key/value heads.
        intermediate_dim: the width inside the feed-forward layers.
        vocabulary_size: the number of tokens.
        positions: the largest length of a sequence.
    """

    name: str
    kind: str
    num_layers: int
    hidden_dim: int
    num_heads: int
    num_key_value_heads: int
    intermediate_dim: int
    vocabulary_size: int
    positions: int = 1024

    @property
    def head_dim(self) -> int:
        """Returns the width of one head."""
        return self.hidden_dim // self.num_heads

    def cache_elements(self, rows: int, positions: int) -> int:
        """Returns the number of elements of a KV cache."""
        per_position = 2 * self.num_layers * self.num_key_value_heads * self.head_dim
        return per_position * rows * positions

    def elements_read_per_step(self, rows: int, filled: float) -> float:
        """Returns the number of elements that one decode step reads at least.

        All weights but the position embeddings, of which a step reads few rows, and
        the keys and values of the positions so far.
        """
        counted = {
            name: shape
            for name, shape in weight_shapes(self).items()
            if not name.startswith("position_embedding")
        }
        weights = sum(int(np.prod(shape)) for shape in counted.values())
        return weights + self.cache_elements(rows, 1) * filled

    def training_operations(self, rows: int, length: int) -> int:
        """Returns the multiplications and additions of a training step's products.

        Those with the weights, those of attention and the head's. Attention counts
        with all pairs of positions, as without a causal kernel they are computed and
        then masked. The backward pass has two products for each of the forward pass.
        """
        weights = sum(
            int(np.prod(size))
            for name, size in weight_shapes(self).items()
            if name.endswith("/kernel")
        )
        head = self.vocabulary_size * self.hidden_dim
        # Queries with keys, and weights with values.
        attention = 2 * length * self.num_heads * self.head_dim * self.num_layers
        return 3 * 2 * rows * length * (weights + head + attention)


def weight_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, by its path in `blocks.CustomBackbone`."""
    width, heads, size = shape.hidden_dim, shape.num_heads, shape.head_dim
    key_value = (width, shape.num_key_value_heads, size)
    inner = shape.intermediate_dim
    is_gpt2 = shape.kind == "gpt2"
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding/embeddings": (shape.vocabulary_size, width)
    }

    def add_dense(name: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> None:
        shapes[f"{name}/kernel"] = kernel
        if is_gpt2:
            shapes[f"{name}/bias"] = bias

    def add_norm(name: str) -> None:
        if is_gpt2:
            shapes[f"{name}/gamma"] = (width,)
            shapes[f"{name}/beta"] = (width,)
        else:
            shapes[f"{name}/scale"] = (width,)

    if is_gpt2:
        shapes["position_embedding/embeddings"] = (shape.positions, width)
    for i in range(shape.num_layers):
        block = f"transformer_layer_{i}"
        add_dense(f"{block}/self_attention/query", (width, heads, size), (heads, size))
        add_dense(f"{block}/self_attention/key", key_value, key_value[1:])
        add_dense(f"{block}/self_attention/value", key_value, key_value[1:])
        output = f"{block}/self_attention/attention_output"
        add_dense(output, (heads, size, width), (width,))
        add_norm(f"{block}/attention_norm")
        add_dense(f"{block}/ffn/intermediate", (width, inner), (inner,))
        if not is_gpt2:
            add_dense(f"{block}/ffn/gate", (width, inner), (inner,))
        add_dense(f"{block}/ffn/output", (inner, width), (width,))
        add_norm(f"{block}/ffn_norm")
    add_norm("layer_norm")
    return shapes


def random_weights(
    shape: ModelShape, seed: int = 0, gain: float = 1.4
) -> dict[str, np.ndarray]:
    """Draws weights from a normal distribution, around 1 for the scales of norms.

    Args:
        shape: the sizes of the model.
        seed: of NumPy's generator.
        gain: the kernels' standard deviation times the root of the width. If all
            weights had 0.02, embeddings would outweigh the blocks, and with the tied
            head greedy decoding would repeat the last token.

    Returns:
        A dict of `float32` arrays by name.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, size in weight_shapes(shape).items():
        values = rng.standard_normal(size, dtype="float32")
        is_kernel = name.endswith("/kernel")
        values *= gain / np.sqrt(shape.hidden_dim) if is_kernel else 0.02
        if name.endswith(("/gamma", "/scale")):
            values += 1.0
        weights[name] = values
    return weights


def save_weights(path: str | pathlib.Path, weights: dict[str, np.ndarray]) -> None:
    """Writes weights to an `.npz` file."""
    np.savez(path, **weights)


def load_weights(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `save_weights` wrote."""
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def keras_hub_name(kind: str, name: str) -> str:
    """Returns the path of a weight in KerasHub's backbone."""
    if name.startswith("layer_norm/") and kind == "llama":
        return name.replace("layer_norm/", "sequence_output_layernorm/")
    for ours, theirs in KERAS_HUB_NAMES[kind].items():
        name = name.replace(f"/{ours}/", f"/{theirs}/")
    return name


def torch_weights(
    shape: ModelShape, weights: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the weights with the names and in the layout of transformers."""
    make = gpt2_torch_weights if shape.kind == "gpt2" else llama_torch_weights
    return make(shape, weights)


def gpt2_torch_weights(
    shape: ModelShape, weights: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns those of `GPT2LMHeadModel`: kernels `(inputs, outputs)`, as in Keras."""
    width = shape.hidden_dim
    found = {
        "transformer.wte.weight": weights["token_embedding/embeddings"],
        "transformer.wpe.weight": weights["position_embedding/embeddings"],
        "transformer.ln_f.weight": weights["layer_norm/gamma"],
        "transformer.ln_f.bias": weights["layer_norm/beta"],
        "lm_head.weight": weights["token_embedding/embeddings"],
    }
    for i in range(shape.num_layers):
        ours, theirs = f"transformer_layer_{i}", f"transformer.h.{i}"
        projections = [
            f"{ours}/self_attention/{name}" for name in ("query", "key", "value")
        ]
        found[f"{theirs}.attn.c_attn.weight"] = np.concatenate(
            [weights[f"{name}/kernel"].reshape(width, -1) for name in projections], 1
        )
        found[f"{theirs}.attn.c_attn.bias"] = np.concatenate(
            [weights[f"{name}/bias"].reshape(-1) for name in projections]
        )
        for name, part in (
            ("attn.c_proj", "self_attention/attention_output"),
            ("mlp.c_fc", "ffn/intermediate"),
            ("mlp.c_proj", "ffn/output"),
        ):
            kernel, bias = (weights[f"{ours}/{part}/{x}"] for x in ("kernel", "bias"))
            found[f"{theirs}.{name}.weight"] = kernel.reshape(-1, kernel.shape[-1])
            found[f"{theirs}.{name}.bias"] = bias
        for name, part in (("ln_1", "attention_norm"), ("ln_2", "ffn_norm")):
            found[f"{theirs}.{name}.weight"] = weights[f"{ours}/{part}/gamma"]
            found[f"{theirs}.{name}.bias"] = weights[f"{ours}/{part}/beta"]
    return found


def llama_torch_weights(
    shape: ModelShape, weights: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns those of `LlamaForCausalLM`: kernels `(outputs, inputs)`."""
    found = {
        "model.embed_tokens.weight": weights["token_embedding/embeddings"],
        "model.norm.weight": weights["layer_norm/scale"],
        "lm_head.weight": weights["token_embedding/embeddings"],
    }
    for i in range(shape.num_layers):
        ours, theirs = f"transformer_layer_{i}", f"model.layers.{i}"
        for name, part in (
            ("self_attn.q_proj", "self_attention/query"),
            ("self_attn.k_proj", "self_attention/key"),
            ("self_attn.v_proj", "self_attention/value"),
            ("self_attn.o_proj", "self_attention/attention_output"),
            ("mlp.gate_proj", "ffn/gate"),
            ("mlp.up_proj", "ffn/intermediate"),
            ("mlp.down_proj", "ffn/output"),
        ):
            kernel = weights[f"{ours}/{part}/kernel"]
            if part == "self_attention/attention_output":
                kernel = kernel.reshape(-1, kernel.shape[-1])
            kernel = kernel.reshape(len(kernel), -1)
            found[f"{theirs}.{name}.weight"] = np.ascontiguousarray(kernel.T)
        for name, part in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            found[f"{theirs}.{name}.weight"] = weights[f"{ours}/{part}/scale"]
    return found
