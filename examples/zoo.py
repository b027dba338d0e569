"""The same small language model with each mixer, trained on the same real text.

    python examples/zoo.py                             # about 40 minutes on 2 cores
    python examples/zoo.py --mixers mamba2 retention   # only these
    python examples/zoo.py --quick                     # a few steps of a few mixers

Each model differs in one hook and is trained for as many steps on the documentation
of Python's syntax (`pydoc_data.topics`, one token per byte). The result is a table of
parameters, held-out loss, speed of training and decoding, and bytes of the cache for
1,024 and 32,768 tokens, saved as Markdown, and a plot of loss against cache size.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import attention
from blocks import CausalLM, CustomBackbone, MixtureOfExperts

HEADS = 4
WINDOW = 64
LENGTHS = (1024, 32768)


def rotary(*args, **kwargs):
    return attention.RotaryAttention(HEADS, *args, **kwargs)


# The mixer of the block at depth `i`.
MIXERS = {
    "multi-head": lambda i: rotary(),
    "multi-query": lambda i: rotary(1),
    "grouped": lambda i: rotary(2),
    "window": lambda i: rotary(2, window=WINDOW),
    "window 5:1": lambda i: rotary(2, window=None if i % 6 == 5 else WINDOW),
    "8-bit cache": lambda i: rotary(2, cache_dtype="int8"),
    "options": lambda i: rotary(
        2, query_key_norm=True, output_gate=True, attention_sinks=True
    ),
    "T5 bias": lambda i: attention.T5Attention(HEADS),
    "ALiBi": lambda i: attention.MultiHeadAttention(
        HEADS, position=attention.AlibiBias()
    ),
    "latent": lambda i: attention.LatentAttention(HEADS, latent_dim=48, rotary_dim=16),
    "differential": lambda i: attention.DifferentialAttention(
        HEADS // 2, position=attention.RotaryPosition()
    ),
    "retention": lambda i: attention.Retention(HEADS),
    "rwkv": lambda i: attention.RWKVTimeMix(HEADS),
    "gated delta": lambda i: attention.GatedDeltaNet(HEADS),
    "mamba2": lambda i: attention.Mamba2(HEADS, state_dim=32),
    "hybrid 3:1": lambda i: rotary() if i % 4 == 3 else attention.GatedDeltaNet(HEADS),
    "experts": lambda i: rotary(2),
}
QUICK = ("window", "latent", "mamba2")


@keras.saving.register_keras_serializable(package="zoo")
class ZooBackbone(CustomBackbone):
    """A stock backbone with one or two hooks overridden."""

    def __init__(self, mixer, **kwargs):
        # Hooks run inside of `super().__init__`.
        self.mixer = mixer
        super().__init__(learned_positions=False, **kwargs)

    def create_attention_layer(self, inputs_shape, layer_index):
        return MIXERS[self.mixer](layer_index)

    def create_ffn(self, inputs_shape, layer_index):
        if self.mixer == "rwkv":
            return attention.RWKVChannelMix(self.intermediate_dim)
        if self.mixer == "experts":
            return MixtureOfExperts(4, self.intermediate_dim // 2)
        return super().create_ffn(inputs_shape, layer_index)

    def get_config(self):
        config = {**super().get_config(), "mixer": self.mixer}
        del config["learned_positions"]
        return config


def read_text():
    """Returns the bytes to train on and the held-out bytes."""
    from pydoc_data.topics import topics

    texts = [topics[name].encode() for name in sorted(topics)]
    held_out = b"\n".join(texts[::10])
    train = b"\n".join(text for i, text in enumerate(texts) if i % 10)
    return (np.frombuffer(x, np.uint8).astype("int32") for x in (train, held_out))


def samples(text, length, count, seed):
    """Returns random pieces of a text: inputs and targets."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(text) - length - 1, count)
    pieces = text[starts[:, None] + np.arange(length + 1)]
    tokens = pieces[:, :-1]
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, pieces[:, 1:]


def make_model(mixer, options):
    keras.utils.set_random_seed(0)
    backbone = ZooBackbone(
        mixer,
        vocabulary_size=256,
        num_layers=options.layers,
        num_heads=HEADS,
        hidden_dim=options.width,
        intermediate_dim=4 * options.width,
    )
    lm = CausalLM(backbone)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, options.steps, warmup_target=3e-3, warmup_steps=options.steps // 10 + 1
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0)
    lm.compile(optimizer=optimizer, sampler="greedy")
    return lm


class StepTimes(keras.callbacks.Callback):
    """Records when each step ended; the first ones compile."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        return float(np.median(np.diff(self.ends)[1:]))


def cache_bytes(backbone, length):
    """Returns the bytes of the cache of one row."""
    leaves = keras.tree.flatten(attention.create_cache(backbone, 1, length))
    sizes = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
    return sum(
        int(np.prod(x.shape)) * sizes[keras.backend.standardize_dtype(x.dtype)]
        for x in leaves
    )


def decode_speed(lm, options):
    """Returns the tokens per second of one row, without the prefill."""
    text = b"The for statement is used to iterate over the elements of a sequence"
    tokens = np.frombuffer(text, np.uint8).astype("int32")[None]
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}

    def seconds(new):
        start = time.perf_counter()
        lm.generate(inputs, max_new_tokens=new, stop_token_ids=None)
        return time.perf_counter() - start

    new = options.new_tokens
    for count in (1, new):
        seconds(count)
    return (new - 1) / (seconds(new) - min(seconds(1) for _ in range(3)))


def run(mixer, options, train, held_out):
    lm = make_model(mixer, options)
    times = StepTimes()
    x, y = samples(train, options.length, options.steps * options.batch, seed=0)
    lm.fit(x, y, batch_size=options.batch, verbose=0, shuffle=False, callbacks=[times])
    x, y = samples(held_out, options.length, options.held_out, seed=1)
    loss = lm.evaluate(x, y, batch_size=options.batch, verbose=0, return_dict=True)
    return {
        "mixer": mixer,
        "parameters": lm.count_params(),
        "loss": loss["loss"],
        "train": options.batch * options.length / times.seconds_per_step(),
        "decode": decode_speed(lm, options),
        "bytes": [cache_bytes(lm.backbone, length) for length in LENGTHS],
    }


def readable(count):
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def table(rows):
    """Returns the rows as Markdown, the best loss first."""
    lines = [
        "| mixer | parameters | held-out loss, nats/byte | training, tokens/s | "
        "decoding, tokens/s | cache at 1k | at 32k |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: row["loss"]):
        short, long = map(readable, row["bytes"])
        lines.append(
            f"| {row['mixer']} | {row['parameters']:,} | {row['loss']:.3f} | "
            f"{row['train']:,.0f} | {row['decode']:,.0f} | {short} | {long} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Plots loss against bytes of the cache at the larger length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    # Names are above and below their points in turn.
    for i, row in enumerate(sorted(rows, key=lambda row: row["loss"])):
        place = (row["bytes"][-1], row["loss"])
        offset = (4, -11) if i % 2 else (4, 4)
        axes.scatter(*place, s=24)
        axes.annotate(row["mixer"], place, xytext=offset, textcoords="offset points")
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel(f"bytes of cache for {LENGTHS[-1]:,} tokens")
    axes.set_ylabel("held-out loss, nats per byte")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mixers", nargs="+", choices=list(MIXERS), help="default: all")
    add("--quick", action="store_true", help="a few steps of tiny models")
    add("--steps", type=int)
    add("--out", type=pathlib.Path, default=pathlib.Path("zoo"), help="folder")
    options = parser.parse_args()
    options.layers, options.width, options.length, options.batch = 6, 128, 256, 8
    options.new_tokens, options.held_out = 128, 64
    if options.quick:
        options.layers, options.width, options.length = 2, 32, 128
        options.new_tokens, options.held_out = 16, 8
    options.steps = options.steps or (8 if options.quick else 300)
    options.mixers = options.mixers or list(QUICK if options.quick else MIXERS)
    return options


def main():
    options = parse_arguments()
    train, held_out = read_text()
    rows = []
    for mixer in options.mixers:
        rows.append(run(mixer, options, train, held_out))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    (options.out / "zoo.md").write_text(text, encoding="utf-8")
    plot(rows, options.out / "zoo.png")
    print(f"\n{text}\nsaved to {options.out / 'zoo.md'} and {options.out / 'zoo.png'}")


if __name__ == "__main__":
    main()
