"""Six ways to connect a decoder's parts, none with a second forward pass.

    python examples/topologies.py                 # some minutes
    python examples/topologies.py --quick         # under a minute
    python examples/topologies.py --only albert   # one of them

Each topology is a class or two below, of a few lines each. `main` puts each into
a small byte-level language model, compares decoding with a cache with the full
forward pass, trains it with `fit` on the documentation of Python's syntax
(`pydoc_data.topics`, part of every Python installation), generates, and prints a
row of a table.
"""

import argparse
import logging
import os

if __name__ == "__main__":
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow would warn of one compilation for each model.
    logging.getLogger("tensorflow").setLevel("ERROR")

import keras
import numpy as np
from keras import ops

import attention
from blocks import CausalLM, CustomBackbone, CustomDecoder

register = keras.saving.register_keras_serializable(package="topologies")


# === Parallel attention and feed-forward layer: one norm, one sum ===
# GPT-J; PaLM (https://arxiv.org/abs/2204.02311)


class ParallelDecoder(CustomDecoder):
    norm_names = ("norm",)

    def transform(self, x, padding_mask=None):
        h = self.norm(x)
        return x + self.self_attention(h, padding_mask=padding_mask) + self.ffn(h)


@register
class ParallelBackbone(CustomBackbone):
    decoder_class = ParallelDecoder


# === Sandwich norms: one before and one after each part ===
# Gemma 2 (https://arxiv.org/abs/2408.00118)


class SandwichDecoder(CustomDecoder):
    norm_names = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")

    def create_norm(self, inputs_shape):
        return keras.layers.RMSNormalization(epsilon=1e-6)

    def transform(self, x, padding_mask=None):
        h = self.self_attention(self.attention_norm(x), padding_mask=padding_mask)
        x = x + self.attention_post_norm(h)
        return x + self.ffn_post_norm(self.ffn(self.ffn_norm(x)))


@register
class SandwichBackbone(CustomBackbone):
    decoder_class = SandwichDecoder


# === One attention layer applied twice in a block: two caches, one set of weights ===


class TwiceDecoder(CustomDecoder):
    def transform(self, x, padding_mask=None):
        for _ in range(2):
            h = self.attention_norm(x)
            x = x + self.self_attention(h, padding_mask=padding_mask)
        return x + self.ffn(self.ffn_norm(x))


@register
class TwiceBackbone(CustomBackbone):
    decoder_class = TwiceDecoder


# === One block at all depths: a cache for each depth, one set of weights ===
# ALBERT (https://arxiv.org/abs/1909.11942)


@register
class AlbertBackbone(CustomBackbone):
    def create_decoder(self, layer_index):
        if layer_index > 0:
            return self.transformer_layers[0]
        return super().create_decoder(layer_index)


# === A feed-forward layer with a memory: each token is mixed with the one before ===
# RWKV's channel mixing (https://arxiv.org/abs/2305.13048)


@register
class ChannelMix(attention.CachedLayer):
    def build(self, inputs_shape):
        self.width = inputs_shape[-1]
        half = keras.initializers.Constant(0.5)
        self.mix = self.add_weight(name="mix", shape=(2, self.width), initializer=half)
        self.key = keras.layers.Dense(4 * self.width, "relu", name="key")
        self.gate = keras.layers.Dense(self.width, "sigmoid", name="gate")
        self.value = keras.layers.Dense(self.width, name="value")
        self.key.build(inputs_shape)
        self.gate.build(inputs_shape)
        self.value.build((*inputs_shape[:-1], 4 * self.width))

    def create_cache(self, batch_size, max_length):
        return ops.zeros((batch_size, 1, self.width), self.compute_dtype)

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        before = ops.zeros_like(x[:, :1]) if cache is None else cache
        history = ops.concatenate([before, x], axis=1)
        change = history[:, :-1] - x
        mix = ops.cast(self.mix, x.dtype)
        gate, key = self.gate(x + mix[0] * change), self.key(x + mix[1] * change)
        outputs = gate * self.value(ops.square(key))
        if cache is None:
            return outputs
        return outputs, attention.last_tokens(history, padding_mask)


@register
class TokenShiftBackbone(CustomBackbone):
    def create_ffn(self, inputs_shape, layer_index):
        return ChannelMix()


# === Keys and values shared across depth: the first block makes them, all read ===
# Cross-Layer Attention (https://arxiv.org/abs/2405.12981),
# YOCO (https://arxiv.org/abs/2405.05254)


class ProducerDecoder(CustomDecoder):
    def transform(self, x, padding_mask=None):
        h, key_value = self.self_attention(
            self.attention_norm(x), padding_mask=padding_mask, return_key_value=True
        )
        x = x + h
        return x + self.ffn(self.ffn_norm(x)), key_value


class ReaderDecoder(CustomDecoder):
    def create_attention_layer(self, inputs_shape):
        return attention.SharedKeyValueAttention(self.num_heads)

    def transform(self, x, key_value, padding_mask=None):
        h = self.attention_norm(x)
        x = x + self.self_attention(h, key_value, padding_mask=padding_mask)
        return x + self.ffn(self.ffn_norm(x))


@register
class SharedKeyValueBackbone(CustomBackbone):
    def create_decoder(self, layer_index):
        block = ReaderDecoder if layer_index else ProducerDecoder
        return block(self.intermediate_dim, self.num_heads, self.num_key_value_heads)

    def transform(self, x, padding_mask):
        producer, *readers = self.transformer_layers
        x, key_value = producer(x, padding_mask=padding_mask)
        for reader in readers:
            x = reader(x, key_value, padding_mask=padding_mask)
        return x


TOPOLOGIES = {
    "stock": CustomBackbone,
    "parallel": ParallelBackbone,
    "sandwich": SandwichBackbone,
    "twice": TwiceBackbone,
    "albert": AlbertBackbone,
    "token_shift": TokenShiftBackbone,
    "shared_key_value": SharedKeyValueBackbone,
}
QUICK = ("parallel", "twice", "shared_key_value")


# === Training, checking and generating with each of them ===


def training_samples(length):
    """Returns Python's documentation of its syntax as bytes: inputs and targets."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
    tokens = np.frombuffer(text, "uint8").astype("int32")
    count = (len(tokens) - 1) // length
    inputs = tokens[: count * length].reshape(count, length)
    return inputs, tokens[1 : count * length + 1].reshape(count, length)


def as_inputs(tokens):
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


def build_model(name, arguments):
    backbone = TOPOLOGIES[name](
        vocabulary_size=256,
        num_layers=arguments.layers,
        num_heads=4,
        hidden_dim=arguments.width,
        intermediate_dim=4 * arguments.width,
        max_sequence_length=2 * arguments.length,
    )
    lm = CausalLM(backbone)
    lm.compile(optimizer=keras.optimizers.AdamW(3e-3), sampler="greedy")
    return lm


def mean_loss(lm, inputs, targets):
    losses = keras.losses.sparse_categorical_crossentropy(
        targets, lm(as_inputs(inputs)), from_logits=True
    )
    return float(ops.convert_to_numpy(losses).mean())


def cached_minus_full(lm, tokens):
    """Returns the largest difference of logits with a cache and without one."""
    rows, length = tokens.shape
    full = ops.convert_to_numpy(lm(as_inputs(tokens)))
    cache = attention.create_cache(lm, rows, length)
    start, worst = 0, 0.0
    for size in [length - 4, 1, 1, 1, 1]:
        inputs = as_inputs(tokens[:, start : start + size])
        logits, cache = attention.call_with_cache(lm, inputs, cache, start)
        difference = ops.convert_to_numpy(logits) - full[:, start : start + size]
        worst, start = max(worst, np.abs(difference).max()), start + size
    return float(worst)


def cache_elements_per_token(lm, length):
    cache = attention.create_cache(lm, 1, length)
    return sum(int(np.prod(x.shape)) for x in keras.tree.flatten(cache)) / length


def generate(lm, prompt, count):
    tokens = np.frombuffer(prompt.encode("utf-8"), "uint8").astype("int32")[None]
    outputs = lm.generate(as_inputs(tokens), stop_token_ids=None, max_new_tokens=count)
    text = bytes(ops.convert_to_numpy(outputs["token_ids"])[0].astype("uint8"))
    return text.decode("utf-8", errors="replace")


def run(name, arguments):
    keras.utils.set_random_seed(0)
    lm = build_model(name, arguments)
    inputs, targets = training_samples(arguments.length)
    order = np.random.default_rng(0).permutation(len(inputs))
    order = order[: arguments.steps * arguments.batch]
    few = order[: arguments.batch]
    before = mean_loss(lm, inputs[few], targets[few])
    lm.fit(
        as_inputs(inputs[order]),
        targets[order],
        batch_size=arguments.batch,
        shuffle=False,
        verbose=0,
    )
    after = mean_loss(lm, inputs[few], targets[few])
    worst = cached_minus_full(lm, inputs[:2])
    text = generate(lm, arguments.prompt, arguments.new_tokens)
    per_token = cache_elements_per_token(lm, arguments.length)
    print(
        f"{name:<17} {lm.count_params():>10,} {per_token:>12,.0f} "
        f"{before:>6.2f} -> {after:<5.2f} {worst:>9.1e}   {text!r}",
        flush=True,
    )
    # Float32 sums are taken in another order; with a wrong cache they differ far more.
    if not worst < 1e-3:
        raise SystemExit(f"{name}: cached and full outputs differ by {worst}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=TOPOLOGIES, help="one topology instead of all")
    add("--steps", type=int, default=300, help="training steps")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--length", type=int, default=128, help="bytes of a training sample")
    add("--batch", type=int, default=16)
    add("--prompt", default="The ")
    add("--new-tokens", type=int, default=32)
    add("--quick", action="store_true", help="a few steps of a few tiny models")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.layers, arguments.width = 12, 2, 32
        arguments.length, arguments.new_tokens = 32, 8
    print(f"backend {keras.config.backend()}, {arguments.steps} training steps")
    print(
        f"{'topology':<17} {'parameters':>10} {'cache/token':>12} "
        f"{'loss':^15} {'|cached-full|':>9}   generated"
    )
    names = QUICK if arguments.quick else TOPOLOGIES
    for name in [arguments.only] if arguments.only else names:
        run(name, arguments)


if __name__ == "__main__":
    main()
