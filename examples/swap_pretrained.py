"""Swap the attention of a published model, train it a little, and see what it costs.

    python examples/swap_pretrained.py            # about half an hour on 2 cores
    python examples/swap_pretrained.py --quick    # a tiny untrained model, no download

SmolLM2-135M reads a novel. Its attention is replaced by (1) a sliding window, (2) the
same attention with an 8-bit KV cache, (3) multi-query attention, whose one key/value head
is the mean of three, and (4) a recurrent mixer in every other layer. Each is one hook or
one argument, and keeps all weights that fit. Perplexity on held-out text is measured,
through the cache, before and after a short training, by LoRA or, of new layers, of all
their weights; beside it the bytes of the cache for 8,192 tokens and the speed of
decoding. The table is saved as Markdown, and a plot of perplexity against bytes.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import fetch
import keras
import numpy as np

import attention
from blocks import CausalLM
from blocks.models.llama import LlamaBackbone

WINDOW = 128
LONG = 8192


@keras.saving.register_keras_serializable(package="swap_pretrained")
class WindowBackbone(LlamaBackbone):
    """Each token sees the last ones only."""

    def attention_options(self, layer_index):
        return {**super().attention_options(layer_index), "window": WINDOW}


@keras.saving.register_keras_serializable(package="swap_pretrained")
class EightBitBackbone(LlamaBackbone):
    """Keys and values are cached in 8 bits."""

    def attention_options(self, layer_index):
        return {**super().attention_options(layer_index), "cache_dtype": "int8"}


@keras.saving.register_keras_serializable(package="swap_pretrained")
class HybridBackbone(LlamaBackbone):
    """Every other layer is a recurrent mixer, whose cache does not grow."""

    def create_attention_layer(self, inputs_shape, layer_index):
        if layer_index % 2 == 0:
            return super().create_attention_layer(inputs_shape, layer_index)
        return attention.GatedDeltaNet(self.num_heads)


# The class of the backbone, and the arguments that are changed.
SWAPS = {
    "as published": (None, {}),
    "sliding window": (WindowBackbone, {}),
    "8-bit cache": (EightBitBackbone, {}),
    "multi-query": (None, {"num_key_value_heads": 1}),
    "recurrent, every other": (HybridBackbone, {}),
}


def read(options):
    """Returns a model without a preprocessor, and tokens to train on and held-out."""
    if options.quick:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        lm = CausalLM(LlamaBackbone(256, 2, 6, 48, 64, num_key_value_heads=3))
        tokens = np.frombuffer(text.encode(), np.uint8)
    else:
        loaded = CausalLM.from_preset(str(options.checkpoint or fetch.model()))
        lm = CausalLM(loaded.backbone)
        text = fetch.novel().read_text(encoding="utf-8")
        tokens = keras.ops.convert_to_numpy(loaded.preprocessor.tokenizer(text))
    held_out = options.held_out * options.length + 1
    return lm, tokens[:-held_out].astype("int32"), tokens[-held_out:].astype("int32")


def samples(tokens, starts, length):
    """Returns pieces of a text, and the next token of each of theirs."""
    pieces = tokens[np.asarray(starts)[:, None] + np.arange(length + 1)]
    x = pieces[:, :-1]
    return {"token_ids": x, "padding_mask": np.ones_like(x)}, pieces[:, 1:]


def compile_model(lm):
    lm.compile(
        optimizer=keras.optimizers.Adam(2e-4, clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )


def perplexity(lm, held_out, options):
    """Returns it as generation has it: each token's logits through the cache."""
    losses = []
    for first in range(0, options.held_out, options.batch):
        starts = np.arange(first, first + options.batch) * options.length
        x, y = samples(held_out, starts, options.length)
        cache = attention.create_cache(lm.backbone, options.batch, options.length)
        hidden, _ = attention.call_with_cache(lm.backbone, x, cache, 0)
        logits = lm.compute_logits(hidden)
        loss = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        losses.append(keras.ops.convert_to_numpy(loss))
    return float(np.exp(np.mean(losses)))


def choose_what_is_trained(lm, report):
    """LoRA where all weights were kept, and otherwise those that are new."""
    if not report.new:
        lm.enable_lora(8)
        return
    for weight in lm.weights:
        weight.trainable = weight.path in report.new


def cache_bytes(lm):
    """Returns the bytes of the cache of one row."""
    leaves = keras.tree.flatten(attention.create_cache(lm.backbone, 1, LONG))
    arrays = [keras.ops.shape(x) for x in leaves]
    sizes = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
    kinds = [sizes[keras.backend.standardize_dtype(x.dtype)] for x in leaves]
    return sum(int(np.prod(shape)) * size for shape, size in zip(arrays, kinds))


def decode_speed(lm, tokens, options):
    """Returns the tokens per second of one row, without the prefill."""
    prompt = tokens[None, : options.length]

    def seconds(new):
        start = time.perf_counter()
        lm.generate(prompt, max_new_tokens=new, stop_token_ids=None)
        return time.perf_counter() - start

    for count in (1, options.new_tokens):
        seconds(count)
    rest = seconds(options.new_tokens) - min(seconds(1) for _ in range(2))
    return (options.new_tokens - 1) / rest


def run(name, original, train, held_out, options):
    """Returns a row of the table."""
    keras.utils.set_random_seed(0)
    cls, changes = SWAPS[name]
    lm, report = original.swap(cls, **changes)
    compile_model(lm)
    row = {"name": name, "before": perplexity(lm, held_out, options)}
    row["kept"], row["new"] = len(report.kept), len(report.new)
    row["adapted"] = len(report.adapted)
    row["bytes"], row["speed"] = cache_bytes(lm), decode_speed(lm, held_out, options)
    choose_what_is_trained(lm, report)
    compile_model(lm)
    count = options.steps * options.batch
    starts = np.random.default_rng(0).integers(
        0, len(train) - options.length - 1, count
    )
    lm.fit(*samples(train, starts, options.length), batch_size=options.batch, verbose=0)
    row["after"] = perplexity(lm, held_out, options)
    return row


def table(rows):
    lines = [
        "| attention | weights kept, adapted, new | perplexity | after training | "
        f"cache for {LONG:,} tokens | decoding, tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['kept']}, {row['adapted']}, {row['new']} | "
            f"{row['before']:.2f} | {row['after']:.2f} | {row['bytes'] / 2**20:.1f} MiB "
            f"| {row['speed']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Plots perplexity against bytes, before (hollow) and after training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, row in enumerate(rows):
        x, color = row["bytes"] / 2**20, f"C{i}"
        axes.plot([x, x], [row["before"], row["after"]], color=color, linewidth=1)
        axes.scatter(x, row["before"], s=36, facecolors="none", edgecolors=color)
        axes.scatter(x, row["after"], s=36, color=color, label=row["name"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"MiB of cache for {LONG:,} tokens")
    axes.set_ylabel("perplexity on held-out text")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", help="of the Llama kind; default: SmolLM2-135M-Instruct")
    add("--only", nargs="+", choices=list(SWAPS), default=list(SWAPS))
    add("--steps", type=int, help="of training")
    add("--out", type=pathlib.Path, default=pathlib.Path("swap_pretrained"))
    add("--quick", action="store_true", help="a few steps of a tiny model")
    options = parser.parse_args()
    options.length, options.batch, options.held_out = 256, 4, 16
    options.new_tokens = 64
    if options.quick:
        options.only = ["multi-query", "recurrent, every other"]
        options.length, options.held_out, options.new_tokens = 64, 4, 8
    options.steps = options.steps or (2 if options.quick else 20)
    return options


def main():
    options = parse_arguments()
    lm, train, held_out = read(options)
    rows = []
    for name in options.only:
        rows.append(run(name, lm, train, held_out, options))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "swap_pretrained.md").write_text(table(rows), encoding="utf-8")
    plot(rows, options.out / "swap_pretrained.png")
    print(f"\n{table(rows)}\nsaved to {options.out}")


if __name__ == "__main__":
    main()
