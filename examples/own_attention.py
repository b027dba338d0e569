"""Softmax attention of one's own: override a step, keep training and generation.

    python examples/own_attention.py              # about two minutes
    python examples/own_attention.py --quick      # under a minute

Four layers, each changing one thing about attention: heads that talk to each other, a
gate on the values, only the best keys, and a KV cache that thins out what is long ago.
Each is checked by the conformance kit (a prefill, chunks, single tokens, ragged rows
and saving all give what the whole sequence gives), then trained on Python's own
documentation, from which it generates.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
from keras import ops

from attention import (
    CachePolicy,
    GroupedQueryAttention,
    RotaryAttention,
    declare_axes,
)
from attention.testing import check_cached_layer
from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone

register = keras.saving.register_keras_serializable("own_attention")


@register
class TalkingHeadsAttention(GroupedQueryAttention):
    """Mixes the logits of all heads, and their weights (Shazeer et al., 2020)."""

    def build(self, query_shape, value_shape=None, key_shape=None):
        super().build(query_shape, value_shape, key_shape)
        shape = (self.num_heads, self.num_heads)
        # Each device that has some of the heads needs all of these weights.
        declare_axes(self, {"mix_logits": (None, None), "mix_weights": (None, None)})
        self.mix_logits = self.add_weight(shape, "identity", name="mix_logits")
        self.mix_weights = self.add_weight(shape, "identity", name="mix_weights")

    def compute_weights(self, logits, mask):
        def mix(x, weight):
            return ops.einsum("bhqk,hg->bgqk", x, ops.cast(weight, x.dtype))

        weights = super().compute_weights(mix(logits, self.mix_logits), mask)
        return mix(weights, self.mix_weights)


@register
class GatedValueAttention(RotaryAttention):
    """Multiplies each value by a gate that its own token computes."""

    def build(self, query_shape, value_shape=None, key_shape=None):
        super().build(query_shape, value_shape, key_shape)
        heads = self.cache_sizes()["value"]
        source_shape = value_shape or query_shape
        self.value_gate = self.make_projection("value_gate", heads, source_shape)

    def project(self, query, value, key):
        query, new = super().project(query, value, key)
        gate = ops.sigmoid(self.value_gate(value))
        return query, {**new, "value": new["value"] * gate}


@register
class TopKAttention(RotaryAttention):
    """Lets each query see its `k` best keys only (Gupta et al., 2021)."""

    def __init__(self, num_heads, num_key_value_heads=None, k=8, **kwargs):
        super().__init__(num_heads, num_key_value_heads, **kwargs)
        self.k = k

    def compute_weights(self, logits, mask):
        seen = logits if mask is None else ops.where(mask, logits, -1e30)
        # The least of the k largest; where there are fewer, of all.
        least = ops.sort(seen, axis=-1)[..., -self.k :][..., :1]
        return super().compute_weights(seen, seen >= ops.maximum(least, -1e29))

    def get_config(self):
        return {**super().get_config(), "k": self.k}


@register
class ThinningCache(CachePolicy):
    """Keeps the last `distance` tokens, and every second one of those before."""

    def __init__(self, distance):
        self.distance = distance
        self.recent = -(-distance // 2)  # slots for odd positions

    def slots(self, max_length):
        return self.recent + -(-max_length // 2)

    def positions(self, slots, index):
        # Even positions stay, in slots of their own; the last odd ones are in a ring.
        even = 2 * ops.arange(slots - self.recent, dtype="int32")
        even = ops.where(even < index[..., None], even, self.nowhere)
        last = index[..., None] // 2 - 1
        odd = last - ops.mod(last - ops.arange(self.recent, dtype="int32"), self.recent)
        odd = ops.where(odd >= 0, 2 * odd + 1, self.nowhere)
        return ops.concatenate([odd, even], axis=-1)

    def visible(self, query_positions, key_positions):
        near = key_positions > query_positions - self.distance
        return ops.logical_or(near, key_positions % 2 == 0)

    def can_rewind(self, cache, from_index, to_index):
        return from_index <= 2 * self.recent or from_index - to_index <= 1

    def get_config(self):
        return {"distance": self.distance}


def thinning_attention(num_heads, num_key_value_heads):
    policy = ThinningCache(distance=8)
    return RotaryAttention(num_heads, num_key_value_heads, cache_policy=policy)


LAYERS = {
    "talking heads": TalkingHeadsAttention,
    "gated values": GatedValueAttention,
    "top-k keys": TopKAttention,
    "thinning cache": thinning_attention,
}


def make_language_model(make_attention, length):
    class Backbone(CustomBackbone):
        def create_attention_layer(self, inputs_shape, layer_index):
            return make_attention(self.num_heads, self.num_key_value_heads)

    backbone = Backbone(
        vocabulary_size=256,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=2 * length,
    )
    tokenizer = keras_hub.tokenizers.ByteTokenizer()
    preprocessor = CausalLMPreprocessor(tokenizer, sequence_length=length, end_token=0)
    return CausalLM(backbone, preprocessor)


def load_texts(length, count):
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    return [text[i * length : (i + 1) * length] for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer layers, texts and checks"
    )
    quick = parser.parse_args().quick
    length = 64 if quick else 128
    texts = load_texts(length, 128 if quick else 2048)
    checks = ["prefill_and_steps", "padding"] if quick else None
    layers = list(LAYERS.items())
    for name, make_attention in layers[::3] if quick else layers:
        keras.utils.set_random_seed(0)
        report = check_cached_layer(
            lambda make=make_attention: make(4, 2),
            hidden_dim=16,
            max_length=24,
            checks=checks,
        )
        lm = make_language_model(make_attention, length)
        lm.compile(optimizer=keras.optimizers.Adam(3e-3), sampler="greedy")
        history = lm.fit(texts, batch_size=16, verbose=0).history
        text = lm.generate("The following ", max_new_tokens=24)
        print(
            f"{name}: {len(report)} checks hold, largest difference "
            f"{max(report.values()):.1e}; loss {history['loss'][-1]:.2f}; {text!r}"
        )


if __name__ == "__main__":
    main()
