"""Train an encoder-decoder model to restore text without case, accents and punctuation.

    python examples/translate.py                       # a quarter of an hour
    python examples/translate.py --picture maps.png    # where the cross-attention looks
    python examples/translate.py --quick               # a few steps of a tiny model

Sources are lines of Python's documentation (`pydoc_data.topics`, a part of every Python
installation) in small letters and without punctuation; targets are the lines as they were.
A stock `CustomSeq2SeqBackbone` of bytes learns that with `model.fit` on pairs of strings,
and restores lines that it has not seen, by the likeliest token at each step and by beam
search. The encoder runs once for a line, whatever is generated.
"""

import argparse
import os
import random
import re
import unicodedata

# What begins a target, and ends both: bytes that no text has.
START, END = 2, 1


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backend", choices=("tensorflow", "jax", "torch"), default=None)
    add("--steps", type=int, default=None, help="training steps (default: 1500)")
    add("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    add("--width", type=int, default=128)
    add("--length", type=int, default=48, help="bytes of a line")
    add("--batch", type=int, default=64)
    add("--beams", type=int, default=4)
    add("--picture", help="file for the maps of the last cross-attention")
    add("--quick", action="store_true", help="a few steps of a tiny model")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.width, arguments.length = 1, 32, 24
    arguments.steps = arguments.steps or (20 if arguments.quick else 1500)
    return arguments


if __name__ == "__main__":
    # Keras chooses its backend when it is imported.
    ARGUMENTS = parse_arguments()
    if ARGUMENTS.backend:
        os.environ["KERAS_BACKEND"] = ARGUMENTS.backend

import keras  # noqa: E402
import keras_hub  # noqa: E402

from blocks import (  # noqa: E402
    CustomSeq2SeqBackbone,
    Seq2SeqLM,
    Seq2SeqLMPreprocessor,
    attention_maps,
)


def read_lines(length):
    """Returns pieces of the documentation, of whole words, of up to so many bytes."""
    from pydoc_data.topics import topics

    lines, line = [], ""
    for word in " ".join(topics.values()).split():
        longer = f"{line} {word}".strip()
        if len(longer.encode()) > length and line:
            lines.append(line)
            longer = word
        line = longer if len(longer.encode()) <= length else ""
    # Tables and rulers are no text.
    return sorted({x for x in lines if re.fullmatch(r"[\w\s.,;:!?()'\"-]+", x)})


def strip(line):
    """Returns a line in small letters, without accents and punctuation."""
    plain = unicodedata.normalize("NFKD", line.lower())
    return re.sub(r"[^a-z0-9 ]", "", plain)


def make_model(arguments):
    preprocessor = Seq2SeqLMPreprocessor(
        keras_hub.tokenizers.ByteTokenizer(lowercase=False),
        encoder_sequence_length=arguments.length + 1,
        decoder_sequence_length=arguments.length + 2,
        end_token=END,
        decoder_start_token=START,
    )
    backbone = CustomSeq2SeqBackbone(
        vocabulary_size=256,
        num_layers=arguments.layers,
        num_heads=4,
        hidden_dim=arguments.width,
        intermediate_dim=4 * arguments.width,
        max_sequence_length=arguments.length + 2,
    )
    return Seq2SeqLM(backbone, preprocessor)


def restored(lm, lines):
    """Returns what the model makes of lines, and the share of words that are right."""
    found = lm.generate([strip(line) for line in lines])
    pairs = [pair for x, y in zip(found, lines) for pair in zip(x.split(), y.split())]
    words = sum(len(line.split()) for line in lines)
    return found, sum(x == y for x, y in pairs) / words


def main(arguments):
    keras.utils.set_random_seed(0)
    lines = read_lines(arguments.length)
    random.Random(0).shuffle(lines)
    held_out, lines = lines[:64], lines[64:]
    rows = arguments.steps * arguments.batch
    lines = (lines * (rows // len(lines) + 1))[:rows]
    print(f"{len(set(lines))} lines to learn from, {len(held_out)} held out")

    lm = make_model(arguments)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, arguments.steps, warmup_target=2e-3, warmup_steps=arguments.steps // 10
    )
    lm.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), sampler="greedy")
    pairs = {"encoder_text": [strip(x) for x in lines], "decoder_text": lines}
    unseen = {"encoder_text": [strip(x) for x in held_out], "decoder_text": held_out}
    history = lm.fit(
        pairs, batch_size=arguments.batch, validation_data=unseen, verbose=2
    )
    print(f"loss {history.history['val_loss'][-1]:.3f} on held-out lines")

    some = held_out[:4] if arguments.quick else held_out
    unchanged = sum(x == strip(x) for line in some for x in line.split())
    print(
        f"\nwords right: {unchanged / sum(len(x.split()) for x in some):.1%} as they are"
    )
    greedy, share = restored(lm, some)
    print(f"             {share:.1%} by the likeliest token at each step")
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=arguments.beams))
    beams, share = restored(lm, some[:16])
    print(f"             {share:.1%} by {arguments.beams} beams (16 lines)")
    for line, first, second in list(zip(some, greedy, beams))[:4]:
        print(
            f"\nsource  {strip(line)}\ntarget  {line}\ngreedy  {first}\nbeams   {second}"
        )

    if arguments.picture:
        pair = {"encoder_text": strip(some[0]), "decoder_text": some[0]}
        figure = attention_maps(lm, pair, layers=[-1])
        figure.savefig(arguments.picture)
        print(f"\ncross-attention of the last layer: {arguments.picture}")


if __name__ == "__main__":
    main(ARGUMENTS)
