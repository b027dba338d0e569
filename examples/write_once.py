"""Write the forward pass once: three models that decode with a cache.

    python examples/write_once.py            # 1 to 2 minutes
    python examples/write_once.py --quick    # under 40 seconds

1. A functional model of a layer that adds to each token the one before it.
2. A layer made of two of these and a residual connection.
3. A language model: an ordinary `keras.Model` made of a recurrent layer of our own
   and rotary attention. It learns from Python's documentation of its syntax
   (`pydoc_data.topics`, one token per byte), and continues prompts of different
   lengths in one batch.

The first two are the examples with which keras-hub issue #1261 asked for caches
that do not need a second forward pass. `KERAS_BACKEND` chooses the backend.
"""

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

from attention import (
    CachedLayer,
    CompositeCachedLayer,
    RotaryAttention,
    call_with_cache,
    create_cache,
    last_tokens,
)
from blocks import CausalLM


class LagAndAdd(CachedLayer):
    def build(self, inputs_shape):
        self.width = inputs_shape[-1]

    def create_cache(self, batch_size, max_length):
        return ops.zeros((batch_size, 1, self.width), self.compute_dtype)

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        past = ops.zeros_like(x[:, :1]) if cache is None else cache
        seen = ops.concatenate([past, x], axis=1)
        outputs = x + seen[:, :-1]
        return outputs if cache is None else (outputs, last_tokens(seen, padding_mask))


def functional_model():
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, LagAndAdd()(LagAndAdd()(inputs)))
    x = keras.random.normal((5, 7, 3))
    full = model(x)
    cache = create_cache(model, batch_size=5, max_length=7)
    leading, cache = call_with_cache(model, x[:, :-1], cache, 0)
    trailing, cache = call_with_cache(model, x[:, -1:], cache, 6)
    assert_equal(ops.concatenate((leading, trailing), axis=1), full)
    print("Passed: a functional model, with a cache as without one")


class Compound(CompositeCachedLayer):
    def build(self, inputs_shape):
        self.layer0 = LagAndAdd()
        self.layer1 = LagAndAdd()
        self.layer0.build(inputs_shape)
        self.layer1.build(inputs_shape)

    def transform(self, x):
        return x + self.layer1(self.layer0(x))


def compound_layer():
    layer = Compound()
    x = keras.random.normal((5, 7, 3))
    full = layer(x)
    cache = layer.create_cache(batch_size=5, max_length=7)
    leading, cache = layer(x[:, :-1], cache=cache, cache_update_index=0)
    trailing, cache = layer(x[:, -1:], cache=cache, cache_update_index=6)
    assert_equal(ops.concatenate((leading, trailing), axis=1), full)
    print("Passed: a layer of cached layers, with a cache as without one")


def assert_equal(actual, expected):
    actual, expected = map(ops.convert_to_numpy, (actual, expected))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@keras.saving.register_keras_serializable(package="write_once")
class Recurrence(CachedLayer):
    """A gated linear recurrence: `state = keep * state + (1 - keep) * value`.

    Each head learns from its input how much to `keep`. All steps are computed at
    once: the share of step `s` that is left at step `t` is the product of the `keep`s
    between them, whose logarithm is a difference of cumulative sums.
    """

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads

    def build(self, inputs_shape):
        self.width = inputs_shape[-1]

        def dense(name, units=self.width, **kwargs):
            kwargs = {"name": name, "dtype": self.dtype_policy, **kwargs}
            layer = keras.layers.Dense(units, **kwargs)
            layer.build(inputs_shape)
            return layer

        # Untrained, it keeps nearly everything.
        bias = keras.initializers.Constant(2.0)
        self.keep = dense("keep", self.num_heads, bias_initializer=bias)
        self.value = dense("value")
        self.gate = dense("gate", activation="silu")
        self.project = dense("project")

    def create_cache(self, batch_size, max_length):
        shape = (batch_size, self.num_heads, self.width // self.num_heads)
        return ops.zeros(shape, "float32")

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        # (batch, length, heads, dim)
        heads = (*ops.shape(x)[:2], self.num_heads, self.width // self.num_heads)
        value = ops.reshape(ops.cast(self.value(x), "float32"), heads)
        log_keep = ops.log_sigmoid(ops.cast(self.keep(x), "float32"))
        if padding_mask is not None:
            # A padded token keeps everything and adds nothing.
            log_keep = ops.where(ops.cast(padding_mask, "bool")[..., None], log_keep, 0)
        total = ops.cumsum(log_keep, axis=1)
        step = ops.arange(heads[1])
        past = (step[:, None] >= step)[None, :, :, None]
        left = ops.where(past, total[:, :, None] - total[:, None], -1e30)
        new = (1 - ops.exp(log_keep))[..., None] * value
        # (batch, length, length, heads), (batch, length, heads, dim)
        state = ops.einsum("btsh,bshd->bthd", ops.exp(left), new)
        if cache is not None:
            state = state + ops.exp(total)[..., None] * cache[:, None]
        outputs = ops.cast(ops.reshape(state, ops.shape(x)), self.compute_dtype)
        outputs = self.project(outputs * self.gate(x))
        return outputs if cache is None else (outputs, state[:, -1])

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads}


def language_model(width, num_heads, num_layers):
    """Returns an ordinary functional model from token ids to hidden states."""
    norm = keras.layers.LayerNormalization
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.ReversibleEmbedding(256, width, name="token_embedding")(tokens)
    for _ in range(num_layers):
        x = x + Recurrence(num_heads)(norm()(x))
        x = x + RotaryAttention(num_heads)(norm()(x))
        hidden = keras.layers.Dense(4 * width, activation="gelu")(norm()(x))
        x = x + keras.layers.Dense(width)(hidden)
    return keras.Model(tokens, norm()(x))


def train(lm, steps, batch, length):
    """Trains on windows of the documentation; returns losses on held-out text."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = np.frombuffer(text, "uint8").astype("int32")
    data, held_out = data[: -len(data) // 10], data[-len(data) // 10 :]
    starts = np.random.default_rng(0).integers(0, len(data) - length, steps * batch)

    def samples(data, starts):
        windows = np.stack([data[i : i + length + 1] for i in starts])
        x = {"token_ids": windows[:, :-1], "padding_mask": np.ones_like(windows[:, 1:])}
        return x, windows[:, 1:]

    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=4e-3, warmup_steps=max(1, steps // 10)
    )
    lm.compile(optimizer=keras.optimizers.Adam(schedule), sampler="greedy")
    lm.fit(*samples(data, starts), batch_size=batch, shuffle=False, verbose=2)
    test = samples(held_out, range(0, len(held_out) - length - 1, 4 * length))
    loss = lm.evaluate(*test, batch_size=batch, return_dict=True, verbose=0)["loss"]
    shares = np.bincount(test[1].ravel()) / test[1].size
    return loss, -sum(p * np.log(p) for p in shares if p > 0)


def greedy_without_cache(lm, rows, new_tokens):
    """Returns the expected tokens: each from the whole row, without a cache."""
    rows, width = [list(row) for row in rows], max(map(len, rows)) + new_tokens
    for _ in range(new_tokens):
        logits = ops.convert_to_numpy(lm(padded(rows, width)))
        for row, scores in zip(rows, logits):
            row.append(int(scores[len(row) - 1].argmax()))
    return rows


def padded(rows, width):
    x = {name: np.zeros((len(rows), width), "int32") for name in INPUTS}
    for i, row in enumerate(rows):
        x["token_ids"][i, : len(row)] = list(row)
        x["padding_mask"][i, : len(row)] = 1
    return x


INPUTS = ("token_ids", "padding_mask")
PROMPTS = (b'The "for" statement', b"A class", b"If the expression list is empty, the")


def own_language_model(quick):
    keras.utils.set_random_seed(0)
    lm = CausalLM(language_model(*((48, 4, 1) if quick else (128, 4, 2))))
    loss, entropy = train(lm, *((60, 16, 64) if quick else (300, 16, 128)))
    print(
        f"{lm.count_params():,} parameters; held-out loss {loss:.2f} nats per byte, "
        f"entropy of single bytes {entropy:.2f}"
    )
    new_tokens, width = 20 if quick else 60, max(map(len, PROMPTS))
    prompts = padded(PROMPTS, width)
    lm.generate(prompts, stop_token_ids=None, max_new_tokens=new_tokens)  # compiles
    start = time.perf_counter()
    outputs = lm.generate(prompts, stop_token_ids=None, max_new_tokens=new_tokens)
    seconds = time.perf_counter() - start
    rows = [x[m].tolist() for x, m in zip(*(outputs[name] for name in INPUTS))]
    for row in rows:
        print("   ", repr(bytes(row).decode(errors="replace")))
    start = time.perf_counter()
    assert rows == greedy_without_cache(lm, PROMPTS, new_tokens)
    print(
        f"Passed: {new_tokens} bytes for each of {len(PROMPTS)} prompts of different "
        f"lengths, the same as without a cache, in {seconds:.2f} s instead of "
        f"{time.perf_counter() - start:.2f} s"
    )


def main(arguments):
    functional_model()
    compound_layer()
    own_language_model(arguments.quick)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, tiny model")
    main(parser.parse_args())
