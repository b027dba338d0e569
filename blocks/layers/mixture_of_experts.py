"""A feed-forward layer of experts, of which each token is sent to a few."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention import CachedLayer
from attention.contract import (
    Activation,
    Cache,
    DType,
    Index,
    Initializer,
    Shape,
    Tensor,
    check_optional_positive_int,
    check_positive_int,
    clone_initializer,
    declare_axes,
    describe,
)
from blocks.layers.feed_forward import FeedForward, GatedFeedForward

# Smaller blocks are slow where there are enough tokens for larger ones.
_SMALL_BLOCK = 32


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MixtureOfExperts(CachedLayer):
    """Experts of which a router picks the best few for each token.

    ```
    x ─► router ─► softmax ─► top k ─┬─► weights ────────────────────┐
      └──────────────────────────────┴─► the k experts of each token ─► weighted sum
    ```

    No token is ever dropped: there is no capacity that an expert could run out of.
    Tokens are sorted by their experts and computed in blocks of one expert each, so
    that the work grows with `num_experts_per_token`, not with `num_experts`. A loss
    that is least where all experts get as many tokens is added when training
    (`add_loss`); padding does not count in it. Returned from `create_ffn`, it is a
    feed-forward layer as any other. It has no state: its cache is `()`. A subclass may
    override `choose`, which picks experts, and `activate`.

    Args:
        num_experts: int. The number of experts.
        intermediate_dim: int. The width inside each expert.
        num_experts_per_token: int. How many experts see a token.
        gated: bool. Whether experts are gated, as in Mixtral, or two layers with an
            activation in between.
        activation: the activation inside experts, of the gate if there is one.
        normalize_weights: bool. Whether the weights of a token's experts sum to 1.
        balance_weight: float. The factor of the loss of uneven loads.
        kernel_initializer: initializer of the router and the experts.
        use_bias: bool. Whether the router and the experts have biases.
        shared_intermediate_dim: int or `None`. The width inside one more expert, which
            sees all tokens and is added, as in DeepSeek-V2; `None`: there is none.
        shared_gate: bool. Whether a sigmoid of a projection, one number for each token,
            multiplies the outputs of that expert, as in Qwen3-Next.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: boolean tensor `(batch, length)`: the real tokens.
        cache: `()`, the cache made by `create_cache`.
        cache_update_index: as for every `CachedLayer`, and so are `segment_ids`,
            which make no difference.
        training: bool. Whether to add the loss.

    Returns:
        A tensor of the shape of `x`; with a cache, `(outputs, ())`.

    Raises:
        TypeError: if a number is no number.
        ValueError: if a token is to see more experts than there are.

    Example:

    >>> import numpy as np
    >>> from blocks import MixtureOfExperts
    >>> layer = MixtureOfExperts(num_experts=4, intermediate_dim=32)
    >>> layer(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    References:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538)
    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961) (the loss)
    - [Gale et al., 2022](https://arxiv.org/abs/2211.15841) (without dropping)
    """

    def __init__(
        self,
        num_experts: int,
        intermediate_dim: int,
        num_experts_per_token: int = 2,
        gated: bool = True,
        activation: Activation = "silu",
        normalize_weights: bool = True,
        balance_weight: float = 0.01,
        kernel_initializer: Initializer = "glorot_uniform",
        use_bias: bool = False,
        shared_intermediate_dim: int | None = None,
        shared_gate: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_experts = check_positive_int("num_experts", num_experts)
        self.intermediate_dim = check_positive_int("intermediate_dim", intermediate_dim)
        self.num_experts_per_token = check_positive_int(
            "num_experts_per_token", num_experts_per_token
        )
        if num_experts_per_token > num_experts:
            raise ValueError(
                "`num_experts_per_token` must be at most `num_experts`. Received: "
                f"num_experts_per_token={num_experts_per_token}, num_experts="
                f"{num_experts}"
            )
        if isinstance(balance_weight, bool) or not isinstance(
            balance_weight, (int, float)
        ):
            raise TypeError(
                "`balance_weight` must be a number; 0 means no loss. Received: "
                f"balance_weight={describe(balance_weight)}"
            )
        self.gated = bool(gated)
        self.activation = keras.activations.get(activation)
        self.normalize_weights = bool(normalize_weights)
        self.balance_weight = float(balance_weight)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.use_bias = bool(use_bias)
        self.shared_intermediate_dim = check_optional_positive_int(
            "shared_intermediate_dim", shared_intermediate_dim
        )
        self.shared_gate = bool(shared_gate)
        self.shared: FeedForward | None = None

    def build(self, inputs_shape: Shape) -> None:
        width = inputs_shape[-1]
        self.router = keras.layers.Dense(
            self.num_experts,
            use_bias=self.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            # Two likely experts are told apart, whatever the policy.
            dtype="float32",
            name="router",
        )
        self.router.build(inputs_shape)
        # Each token needs the chances of all experts.
        declare_axes(self.router, {"kernel": (None, None)})
        shapes: dict[str, Shape] = {"intermediate": (width, self.intermediate_dim)}
        if self.gated:
            shapes["gate"] = (width, self.intermediate_dim)
        shapes["output"] = (self.intermediate_dim, width)
        self.kernels = {
            name: self.add_weight(
                name=f"{name}_kernels",
                shape=(self.num_experts, *shape),
                initializer=_of_each(self.kernel_initializer, i * self.num_experts),
            )
            for i, (name, shape) in enumerate(shapes.items())
        }
        for name in shapes:
            # Where experts can't be divided evenly, each is divided.
            last = (None, "hidden") if name != "output" else ("hidden", None)
            axes = {f"{name}_kernels": ("experts", *last)}
            declare_axes(self, {**axes, f"{name}_biases": ("experts", last[1])})
        self.biases = {}
        if self.use_bias:
            self.biases = {
                name: self.add_weight(
                    name=f"{name}_biases",
                    shape=(self.num_experts, shape[-1]),
                    initializer="zeros",
                )
                for name, shape in shapes.items()
            }
        if self.shared_intermediate_dim is not None:
            kind = GatedFeedForward if self.gated else FeedForward
            self.shared = kind(
                self.shared_intermediate_dim,
                self.activation,
                self.use_bias,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                dtype=self.dtype_policy,
                name="shared",
            )
            self.shared.build(inputs_shape)
            if self.shared_gate:
                self.shared_gate_dense = keras.layers.Dense(
                    1,
                    use_bias=False,
                    kernel_initializer=clone_initializer(self.kernel_initializer),
                    dtype=self.dtype_policy,
                    name="shared_gate",
                )
                self.shared_gate_dense.build(inputs_shape)
                declare_axes(self.shared_gate_dense, {"kernel": (None, None)})

    def create_cache(self, batch_size: int, max_length: int) -> tuple:
        return ()

    def call(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        cache: Cache | None = None,
        cache_update_index: Index | None = None,
        training: bool | None = None,
        segment_ids: Tensor | None = None,
    ) -> Any:
        if padding_mask is not None:
            padding_mask = ops.cast(padding_mask, "bool")
            x = ops.where(padding_mask[..., None], x, 0)
        tokens = ops.reshape(x, (-1, x.shape[-1]))  # (tokens, width)
        chances = ops.softmax(self.router(tokens), axis=-1)  # (tokens, experts)
        # Both (tokens, experts per token).
        weights, experts = self.choose(chances)
        experts = ops.cast(experts, "int32")
        if training and self.balance_weight:
            loss = self._imbalance(chances, experts, padding_mask)
            self.add_loss(self.balance_weight * loss)
        found = self._run_experts(tokens, experts)  # (tokens, per token, width)
        weights = ops.cast(weights, found.dtype)
        outputs = ops.sum(found * weights[..., None], axis=1)  # (tokens, width)
        outputs = ops.reshape(outputs, ops.shape(x))  # (batch, length, width)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate:
                shared = ops.sigmoid(self.shared_gate_dense(x)) * shared
            outputs = outputs + shared
        return outputs if cache is None else (outputs, cache)

    def choose(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        """Picks the experts of each token.

        Args:
            chances: `float32` tensor of shape `(tokens, experts)`: the router's softmax.

        Returns:
            The weights of the experts' outputs and the experts' numbers, both of shape
            `(tokens, num_experts_per_token)`.
        """
        weights, experts = ops.top_k(chances, self.num_experts_per_token)
        if self.normalize_weights:
            weights = weights / ops.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def activate(self, inner: Tensor, gate: Tensor | None) -> Tensor:
        """Activates what is inside an expert.

        Returns a tensor of the shape of `inner` and of `gate`, `(blocks, size, width
        inside)`; `gate` is `None` where experts are not gated.
        """
        if gate is None:
            return self.activation(inner)
        return inner * self.activation(gate)

    def _imbalance(
        self, chances: Tensor, experts: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        """Returns 1 if all experts get as many tokens, a larger number if not."""
        # (tokens, experts), as `chances`; both are averaged to (experts,).
        chosen = ops.sum(ops.one_hot(experts, self.num_experts), axis=1)
        real = ops.ones_like(chances[:, :1])
        if padding_mask is not None:
            real = ops.cast(ops.reshape(padding_mask, (-1, 1)), "float32")
        count = ops.maximum(ops.sum(real), 1.0)
        shares = [ops.sum(y * real, axis=0) / count for y in (chosen, chances)]
        scale = self.num_experts / self.num_experts_per_token
        return scale * ops.sum(shares[0] * shares[1])

    def _run_experts(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """Returns the outputs of each token's experts, `(tokens, per token, width)`.

        `tokens` are of shape `(tokens, width)`, `experts` of `(tokens, per token)`.
        """
        width, per_token = tokens.shape[-1], self.num_experts_per_token
        expert_of = ops.reshape(experts, (-1,))
        # An unknown size is a tensor on TensorFlow, on JAX a symbol.
        count = ops.shape(expert_of)[0]
        if isinstance(count, int) and count <= self.num_experts:
            # Few tokens, as in decoding: each has its experts' kernels read.
            found = self._expert(
                ops.repeat(tokens, per_token, axis=0)[:, None], expert_of
            )
            return ops.reshape(found, (-1, per_token, width))
        size = _block_size(count, self.num_experts)
        blocks = (count + size - 1) // size + self.num_experts
        slots, expert_of_block = self._places(expert_of, count, size, blocks)
        # Slots that no token has hold zeros, those of a token after the last.
        source = ops.full((blocks * size,), count // per_token, dtype="int32")
        pairs = ops.arange(count, dtype="int32") // per_token
        source = ops.scatter_update(source, slots[:, None], pairs)
        padded = ops.concatenate([tokens, ops.zeros_like(tokens[:1])], axis=0)
        inputs = ops.take(padded, source, axis=0)  # (slots, width)
        inputs = ops.reshape(inputs, (-1, size, width))  # (blocks, size, width)
        found = ops.reshape(self._expert(inputs, expert_of_block), (-1, width))
        # (tokens * per token, width) -> (tokens, per token, width)
        return ops.reshape(ops.take(found, slots, axis=0), (-1, per_token, width))

    def _places(
        self, expert_of: Tensor, count: Any, size: Any, blocks: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns a slot for each pair of token and expert, in blocks of one expert.

        The slots are of shape `(pairs,)`; the expert of each block, `(blocks,)`, follows.
        """
        one_hot = ops.one_hot(expert_of, self.num_experts, dtype="int32")
        loads = ops.sum(one_hot, axis=0)
        # Each expert's blocks, the last of them not full, after another's.
        blocks_of = (loads + size - 1) // size
        ends = ops.cumsum(blocks_of)
        starts = (ends - blocks_of) * size
        ranks = ops.sum((ops.cumsum(one_hot, axis=0) - 1) * one_hot, axis=-1)
        slots = ops.take(starts, expert_of) + ranks
        places = ops.arange(blocks, dtype="int32")
        after = ops.cast(places[:, None] >= ends[None], "int32")  # (blocks, experts)
        expert_of_block = ops.minimum(ops.sum(after, axis=-1), self.num_experts - 1)
        return ops.cast(slots, "int32"), ops.cast(expert_of_block, "int32")

    def _expert(self, x: Tensor, expert: Tensor) -> Tensor:
        """Runs each block, `(size, width)`, through its expert, of shape `(blocks,)`."""

        def project(name: str, x: Tensor) -> Tensor:
            kernels = ops.take(self.kernels[name], expert, axis=0)
            outputs = ops.matmul(x, ops.cast(kernels, x.dtype))
            if self.use_bias:
                biases = ops.take(self.biases[name], expert, axis=0)[:, None]
                outputs = outputs + ops.cast(biases, x.dtype)
            return outputs

        gate = project("gate", x) if self.gated else None
        # (blocks, size, width inside)
        inner = self.activate(project("intermediate", x), gate)
        return project("output", inner)  # (blocks, size, width)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_experts=self.num_experts,
            intermediate_dim=self.intermediate_dim,
            num_experts_per_token=self.num_experts_per_token,
            gated=self.gated,
            activation=keras.activations.serialize(self.activation),
            normalize_weights=self.normalize_weights,
            balance_weight=self.balance_weight,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            use_bias=self.use_bias,
            shared_intermediate_dim=self.shared_intermediate_dim,
            shared_gate=self.shared_gate,
        )
        return config


def _block_size(pairs: Any, num_experts: int) -> Any:
    """Returns about a fourth as many tokens as an expert gets.

    Each block copies the kernels of its expert, and each expert's last block is
    padded: so there are about five blocks for each expert, and a fourth is padding.
    `pairs` is how many tokens all experts get: an int, a tensor or a symbol.
    """
    size = pairs // (4 * num_experts) // 8 * 8
    if isinstance(pairs, int):
        return max(size, min(max(pairs // num_experts, 1), _SMALL_BLOCK))
    return ops.maximum(size, _SMALL_BLOCK) if ops.is_tensor(pairs) else _SMALL_BLOCK


def _of_each(initializer: Initializer, first: int) -> Initializer:
    """Draws each expert's kernel by itself: its own size counts, not that of all."""

    def initialize(shape: tuple, dtype: DType = None) -> Tensor:
        copies = (clone_initializer(initializer, first + i) for i in range(shape[0]))
        return ops.stack([copy(shape[1:], dtype) for copy in copies])

    return initialize
