"""Tiny models, data and slow references for the tests of `blocks`."""

import functools

import keras
import keras_hub
import numpy as np
from keras import ops

from attention import (
    AlibiBias,
    DifferentialAttention,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    Mamba2,
    MultiHeadAttention,
    MultiQueryAttention,
    Retention,
    RotaryAttention,
    RotaryPosition,
    T5Attention,
)
from blocks import (
    CausalLM,
    CausalLMPreprocessor,
    CustomBackbone,
    GenerationSizes,
    Speculation,
)
from tests.helpers import EAGER, to_numpy
from tests.planted_faults import Leak

VOCABULARY_SIZE = 60
PACKAGE = "keras_transformer_blocks_tests"

# The mixer of a backbone's layer, by the layer's number.
MIXERS = {
    "mha": lambda x, i: MultiHeadAttention(x.num_heads),
    "mqa": lambda x, i: MultiQueryAttention(x.num_heads),
    "gqa": lambda x, i: GroupedQueryAttention(x.num_heads, x.num_heads // 2),
    # A state that can't be undone, below attention.
    "leak": lambda x, i: MultiHeadAttention(x.num_heads) if i else Leak(),
    "rotary": lambda x, i: RotaryAttention(x.num_heads, x.num_key_value_heads),
    "t5": lambda x, i: T5Attention(x.num_heads, num_buckets=8, max_distance=16),
    "alibi": lambda x, i: MultiHeadAttention(x.num_heads, position=AlibiBias()),
    "latent": lambda x, i: LatentAttention(x.num_heads, latent_dim=8, rotary_dim=2),
    "differential": lambda x, i: DifferentialAttention(
        x.num_heads // 2, position=RotaryPosition()
    ),
    "retention": lambda x, i: Retention(x.num_heads),
    "mamba2": lambda x, i: Mamba2(x.num_heads, state_dim=4),
    "gated_delta_net": lambda x, i: GatedDeltaNet(x.num_heads),
    # Three recurrent layers to one of attention.
    "hybrid": lambda x, i: (
        RotaryAttention(x.num_heads, 2) if i % 4 == 3 else GatedDeltaNet(x.num_heads)
    ),
    # Five windows to one layer that sees everything.
    "local_and_global": lambda x, i: RotaryAttention(
        x.num_heads, 2, window=None if i % 6 == 5 else 4
    ),
}


@keras.saving.register_keras_serializable(package=PACKAGE)
class MixerBackbone(CustomBackbone):
    def __init__(self, mixer, **kwargs):
        self.mixer = mixer
        super().__init__(**kwargs)

    def create_attention_layer(self, inputs_shape, layer_index):
        return MIXERS[self.mixer](self, layer_index)

    def get_config(self):
        return {**super().get_config(), "mixer": self.mixer}


def make_backbone(cls=CustomBackbone, **overrides):
    """A tiny backbone whose weights are large enough for outputs to vary."""
    arguments = {
        "vocabulary_size": VOCABULARY_SIZE,
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "max_sequence_length": 64,
        **overrides,
    }
    backbone = cls(**arguments)
    randomize(backbone)
    return backbone


def make_variant(mixer, **overrides):
    """A tiny backbone of one of the `MIXERS`, with learned positions if it has none."""
    learned = mixer in ("mha", "mqa", "gqa", "leak")
    arguments = {"mixer": mixer, "learned_positions": learned, **overrides}
    return make_backbone(MixerBackbone, **arguments)


def make_lm(backbone=None, preprocessor=None, sampler="greedy", **kwargs):
    lm = CausalLM(backbone or make_backbone(), preprocessor, **kwargs)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler=sampler)
    return lm


# Sizes at which short sequences take many chunks, blocks of steps, and growth.
SMALL_SIZES = GenerationSizes(block_steps=4, few_tokens=2, min_chunk=3, min_capacity=8)
make_small_lm = functools.partial(make_lm, generation_sizes=SMALL_SIZES)


def make_text_lm(**kwargs):
    """A small model of bytes."""
    backbone = make_backbone(num_layers=1, vocabulary_size=256)
    return make_small_lm(backbone, byte_preprocessor(**kwargs))


@keras.saving.register_keras_serializable(package=PACKAGE)
class LettersLM(CausalLM):
    """Generates lower-case letters only: each byte is a character."""

    def compute_logits(self, hidden_states):
        logits = super().compute_logits(hidden_states)
        tokens = ops.arange(logits.shape[-1])
        letters = ops.logical_and(tokens >= ord("a"), tokens <= ord("z"))
        return ops.where(letters, logits, -1e9)


def make_letters_lm(sequence_length=40):
    """A small model of text in which every token is a character."""
    backbone = make_backbone(num_layers=1, vocabulary_size=256, max_sequence_length=256)
    preprocessor = byte_preprocessor(sequence_length=sequence_length)
    lm = LettersLM(backbone, preprocessor, generation_sizes=SMALL_SIZES)
    lm.compile(sampler="greedy")
    return lm


class EagerLM(CausalLM):
    """Not compiled on TensorFlow: tracing takes longer than a few steps untraced."""

    def compile(self, *args, **kwargs):
        super().compile(*args, run_eagerly=EAGER, **kwargs)


def randomize(layer, seed=1):
    """Gives all weights, those that start at zero too, values of their own."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:
        shape = tuple(weight.shape)
        # Small embeddings: what the blocks add decides on the next token.
        scale = 0.3
        if "kernel" in weight.path:
            inputs = (
                int(np.prod(shape[:-1])) if "output" in weight.path else max(shape[:-1])
            )
            scale = 2.0 / np.sqrt(inputs)
        values = rng.normal(size=shape) * scale
        if weight.path.endswith(("/gamma", "/scale")):
            values = values + 1.0
        weight.assign(values.astype("float32"))


def byte_preprocessor(**kwargs):
    """A preprocessor of lower-case letters: bytes 97 and up are left to the model."""
    arguments = {"sequence_length": 16, "end_token": 1, **kwargs}
    return CausalLMPreprocessor(keras_hub.tokenizers.ByteTokenizer(), **arguments)


def bpe_preprocessor(sequence_length=16):
    """A preprocessor with as many tokens as `make_backbone` has."""
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = ["<pad>", "<s>", "</s>", *letters, "Ġ", "th", "he", "Ġt"]
    vocabulary += [f"<{i}>" for i in range(VOCABULARY_SIZE - len(vocabulary))]
    tokenizer = keras_hub.tokenizers.BytePairTokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["t h", "h e", "Ġ t"],
        unsplittable_tokens=["<pad>", "<s>", "</s>"],
    )
    return CausalLMPreprocessor(
        tokenizer, sequence_length, start_token="<s>", end_token="</s>"
    )


def prompts(rows, width=None):
    """Pads rows of tokens on the right."""
    width = width or max(len(row) for row in rows)
    token_ids = np.zeros((len(rows), width), "int32")
    padding_mask = np.zeros((len(rows), width), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = 1
    return {"token_ids": token_ids, "padding_mask": padding_mask}


RAGGED = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]


def rows_of(outputs):
    """The real tokens of each row."""
    pairs = zip(outputs["token_ids"], outputs["padding_mask"])
    return [tokens[mask.astype(bool)].tolist() for tokens, mask in pairs]


def next_token_logits(lm, rows, width):
    """Returns the logits after each row's last token, from the model without a cache."""
    outputs = to_numpy(lm(prompts(rows, width))).astype("float32")
    return np.stack([outputs[i, len(row) - 1] for i, row in enumerate(rows)])


def brute_force_greedy(lm, rows, max_length=None, max_new_tokens=0):
    """Greedy continuation of each row without any cache.

    Up to `max_length`, which may be one number for each row, or by `max_new_tokens`.
    """
    limits = max_length or [len(row) + max_new_tokens for row in rows]
    limits = np.broadcast_to(limits, len(rows))
    # Few widths, as each may be compiled.
    width = max(16, 2 ** int(np.ceil(np.log2(max(limits)))))
    rows = [list(row) for row in rows]
    while any(len(row) < limit for row, limit in zip(rows, limits)):
        logits = next_token_logits(lm, rows, width)
        for row, limit, scores in zip(rows, limits, logits):
            if len(row) < limit:
                row.append(int(scores.argmax()))
    return rows


def generated(lm, rows=RAGGED, **options):
    """The rows that `generate` makes of prompts, by default without stop tokens."""
    options = {"stop_token_ids": None, **options}
    return rows_of(lm.generate(prompts(rows), **options))


def check_generation(lm, rows=RAGGED, **limits):
    """Ragged prompts are continued as without a cache. Returns the rows."""
    limits = limits or {"max_length": 12}
    found = generated(lm, rows, **limits)
    assert found == brute_force_greedy(lm, rows, **limits)
    return found


class Scripted(Speculation):
    """Guesses what it was told would come, but for every `wrong`-th token."""

    def __init__(self, expected, num_tokens, wrong=0):
        super().__init__(num_tokens)
        self.expected, self.wrong, self.rounds = expected, wrong, 0

    def propose(self, memory, rows):
        self.rounds += 1
        guesses = []
        for row, expected in zip(rows, self.expected):
            end = min(len(row) + self.num_tokens, len(expected)) if len(row) else 0
            places = np.arange(len(row), end)
            wrong = self.wrong and places % self.wrong == 0
            guess = np.array(expected, "int32")[places] + wrong
            guesses.append(guess % VOCABULARY_SIZE)
        return guesses


def log_softmax(x):
    x = x.astype("float64")
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
