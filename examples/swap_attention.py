"""Swap the attention of a stock decoder, train it on real text, generate.

    python examples/swap_attention.py                      # under 4 minutes
    python examples/swap_attention.py --attention t5       # another attention
    python examples/swap_attention.py --quick              # under a minute

A stock backbone with one hook overridden (`SwappedBackbone`) goes into a causal
language model, which is trained with `model.fit` on raw strings: the
documentation of Python's syntax, which is part of every Python installation
(`pydoc_data.topics`), or a text file of yours. The model is saved as a preset,
loaded in a fresh process, and generates the same text there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

# These know the order of tokens from learned position embeddings.
LEARNED_POSITIONS = ("mha", "mqa", "gqa")
VARIANTS = (*LEARNED_POSITIONS, "rotary", "t5", "alibi", "window", "latent")
VARIANTS += ("differential", "retention", "rwkv", "gated_delta", "mamba2")
END = "<|endoftext|>"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", choices=VARIANTS, default="rotary")
    add("--backend", choices=("tensorflow", "jax", "torch"), default=None)
    add("--text-file", help="train on this text instead of Python's documentation")
    add("--steps", type=int, default=None, help="training steps (default: 500)")
    add("--layers", type=int, default=3)
    add("--width", type=int, default=192)
    add("--heads", type=int, default=6)
    add("--vocabulary", type=int, default=1024, help="tokens to train BPE for")
    add("--length", type=int, default=128, help="tokens of a training sample")
    add("--batch", type=int, default=16)
    add("--prompt", default='The "for" statement')
    add("--new-tokens", type=int, default=60)
    add("--preset", help="folder to keep the preset in (default: a temporary one)")
    add("--quick", action="store_true", help="a few steps of a tiny model")
    add("--reload", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.width, arguments.heads = 2, 64, 4
        arguments.length, arguments.new_tokens = 64, 20
    if arguments.steps is None:
        arguments.steps = 40 if arguments.quick else 500
    return arguments


if __name__ == "__main__":
    # Keras chooses its backend when it is imported.
    ARGUMENTS = parse_arguments()
    if ARGUMENTS.backend:
        os.environ["KERAS_BACKEND"] = ARGUMENTS.backend
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402

import attention  # noqa: E402
from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone  # noqa: E402


def create_attention(name, heads):
    """Makes the variants of `--attention`, each in one line."""
    return {
        "rotary": lambda: attention.RotaryAttention(heads, heads // 2),
        "mha": lambda: attention.MultiHeadAttention(heads),
        "mqa": lambda: attention.MultiQueryAttention(heads),
        "gqa": lambda: attention.GroupedQueryAttention(heads, heads // 2),
        "t5": lambda: attention.T5Attention(heads),
        "alibi": lambda: attention.GroupedQueryAttention(
            heads, heads // 2, position=attention.AlibiBias()
        ),
        "window": lambda: attention.RotaryAttention(heads, heads // 2, window=32),
        "latent": lambda: attention.LatentAttention(heads),
        "differential": lambda: attention.DifferentialAttention(
            heads // 2, position=attention.RotaryPosition()
        ),
        "retention": lambda: attention.Retention(heads),
        "rwkv": lambda: attention.RWKVTimeMix(heads),
        "gated_delta": lambda: attention.GatedDeltaNet(heads),
        "mamba2": lambda: attention.Mamba2(heads),
    }[name]()


@keras.saving.register_keras_serializable(package="swap_attention")
class SwappedBackbone(CustomBackbone):
    """The swap: a stock backbone whose blocks have the chosen attention."""

    def __init__(self, attention_name="rotary", **kwargs):
        # Hooks run inside of `super().__init__`.
        self.attention_name = attention_name
        super().__init__(**kwargs)

    def create_attention_layer(self, inputs_shape, layer_index):
        return create_attention(self.attention_name, self.num_heads)

    def get_config(self):
        return {**super().get_config(), "attention_name": self.attention_name}


def read_documents(text_file):
    """Returns the texts to train on and the held-out texts."""
    if text_file:
        with open(text_file, encoding="utf-8") as file:
            text = file.read()
        size = 8_000
        texts = [text[i : i + size] for i in range(0, len(text), size)]
        if len(texts) < 2:
            sys.exit(f"{text_file} is too short: at least {size} characters needed.")
    else:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    held_out = texts[::10]
    return [text for i, text in enumerate(texts) if i % 10], held_out


def train_tokenizer(texts, vocabulary_size):
    """Trains byte-level BPE and returns it as a KerasHub tokenizer."""
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocabulary_size, special_tokens=[END], show_progress=False
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return keras_hub.tokenizers.BytePairTokenizer(
        vocabulary=model["vocab"], merges=merges, unsplittable_tokens=[END]
    )


def cut_samples(texts, tokenizer, length):
    """Cuts texts at line ends into strings of about `length` tokens."""
    samples = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        sample, size = "", 0
        for line, tokens in zip(lines, tokenizer(lines)):
            if sample and size + len(tokens) > length:
                samples.append(sample)
                sample, size = "", 0
            sample, size = sample + line, size + len(tokens)
        if sample.strip():
            samples.append(sample)
    return samples


def unigram_entropy(samples, preprocessor):
    """Returns the entropy of single tokens in nats: the best loss without context."""
    _, y, weight = preprocessor(samples)
    tokens = keras.ops.convert_to_numpy(y)[keras.ops.convert_to_numpy(weight) > 0]
    counts = np.bincount(tokens.astype("int64"))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def build_model(arguments, preprocessor):
    backbone = SwappedBackbone(
        attention_name=arguments.attention,
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        hidden_dim=arguments.width,
        intermediate_dim=4 * arguments.width,
        max_sequence_length=2 * arguments.length,
        learned_positions=arguments.attention in LEARNED_POSITIONS,
    )
    lm = CausalLM(backbone, preprocessor)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        arguments.steps,
        warmup_target=3e-3,
        warmup_steps=max(1, arguments.steps // 10),
    )
    lm.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.01),
        weighted_metrics=[
            # A mean over real tokens; the loss is one over padding, too.
            keras.metrics.SparseCategoricalCrossentropy(
                name="nats_per_token", from_logits=True
            )
        ],
        sampler="greedy",
    )
    return lm


def say(lm, arguments):
    return lm.generate(arguments.prompt, max_new_tokens=arguments.new_tokens)


def main(arguments):
    if arguments.reload:
        # The fresh process, which is given the folder only.
        lm = CausalLM.from_preset(arguments.reload)
        lm.compile(sampler="greedy")
        print(json.dumps(say(lm, arguments)))
        return
    keras.utils.set_random_seed(0)
    train_texts, held_out_texts = read_documents(arguments.text_file)
    tokenizer = train_tokenizer(train_texts, arguments.vocabulary)
    preprocessor = CausalLMPreprocessor(
        tokenizer, sequence_length=arguments.length, start_token=END, end_token=END
    )
    train = cut_samples(train_texts, tokenizer, arguments.length)
    held_out = cut_samples(held_out_texts, tokenizer, arguments.length)
    lm = build_model(arguments, preprocessor)
    print(
        f"backend {keras.backend.backend()}, attention {arguments.attention}, "
        f"{lm.count_params():,} parameters, {len(train)} training samples, "
        f"{len(held_out)} held out"
    )
    print(f"\n--- before training ---\n{say(lm, arguments)}\n")

    steps_per_epoch = max(1, len(train) // arguments.batch)
    epochs = -(-arguments.steps // steps_per_epoch)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(train)) for _ in range(epochs)])
    order = order[: arguments.steps * arguments.batch]
    lm.fit(
        [train[i] for i in order],
        batch_size=arguments.batch,
        validation_data=(held_out, None, None),
        shuffle=False,
    )

    loss = lm.evaluate(
        held_out, batch_size=arguments.batch, return_dict=True, verbose=0
    )
    entropy = unigram_entropy(held_out, preprocessor)
    nats = loss["nats_per_token"]
    text = say(lm, arguments)
    print(f"\n--- after training ---\n{text}\n")
    print(
        f"held-out loss {nats:.2f} nats per token, unigram entropy of the same "
        f"tokens {entropy:.2f}: {entropy - nats:.2f} better"
    )

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.preset or os.path.join(temporary, "preset")
        lm.save_to_preset(folder)
        command = [sys.executable, os.path.abspath(__file__), "--reload", folder]
        command += ["--prompt", arguments.prompt]
        command += ["--new-tokens", str(arguments.new_tokens)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    reloaded = json.loads(result.stdout.splitlines()[-1])
    if reloaded != text:
        sys.exit(f"The reloaded model says something else:\n{reloaded}")
    print("saved, reloaded in a fresh process: the same text")


if __name__ == "__main__":
    main(ARGUMENTS)
