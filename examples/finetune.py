"""Fine-tune a published model on a text, and go on after a crash as if there was none.

    python examples/finetune.py                # SmolLM2 reads a novel, on 2 cores: minutes
    python examples/finetune.py --crash        # and again, killed and resumed
    python examples/finetune.py --devices 4    # on simulated devices, on JAX
    python examples/finetune.py --quick        # a tiny untrained model, no download

Passages are packed into rows in which none sees another. Low-rank updates are trained
by AdamW with a warm-up, a cosine decay and clipped gradients. Stop it at any moment, by
Ctrl-C or a crash, and run the same command again: it goes on from the last backup, to the
same losses. `KERAS_BACKEND` chooses the backend.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

if any(x.startswith("--devices") for x in sys.argv):
    os.environ["KERAS_BACKEND"] = "jax"
    # Read when JAX starts; devices that are no CPUs are not affected.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import fetch
import keras
import keras_hub
from keras import distribution

from blocks import (
    BackupAndResume,
    CausalLM,
    CausalLMPreprocessor,
    PackedDocuments,
    Perplexity,
    make_layout_map,
)
from blocks.models.llama import LlamaBackbone


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny untrained model")
    add("--checkpoint", type=pathlib.Path, help="a folder or file instead of SmolLM2")
    add("--text-file", type=pathlib.Path, help="a text instead of the novel")
    add("--rank", type=int, default=8, help="of the updates; 0 trains all weights")
    add("--length", type=int, default=256, help="of a row")
    add("--batch", type=int, default=2, help="rows of a step")
    add("--steps", type=int, default=20, help="of an epoch")
    add("--epochs", type=int, default=3)
    add("--devices", type=int, default=1, help="more than one simulates them on JAX")
    add("--folder", type=pathlib.Path, default="finetuned", help="backup and updates")
    add("--crash", action="store_true", help="compare with a run that is killed")
    add("--crash-at", type=int, metavar="STEP", help="kill this process after it")
    options = parser.parse_args()
    if options.quick:
        options.length, options.steps, options.epochs = 32, 4, 2
    return options


def load(options, weights=True):
    """Returns the model with low-rank updates."""
    keras.utils.set_random_seed(0)
    if options.quick:
        tokenizer = keras_hub.tokenizers.ByteTokenizer()
        preprocessor = CausalLMPreprocessor(tokenizer, options.length, end_token=0)
        backbone = LlamaBackbone(256, 2, 4, 32, 64, num_key_value_heads=2)
        lm = CausalLM(backbone, preprocessor)
    else:
        path = str(options.checkpoint or fetch.model())
        lm = CausalLM.from_preset(path, load_weights=weights)
    if options.rank:
        lm.enable_lora(options.rank, "all")
    return lm


def on_devices(options):
    """Divides weights and batches among the devices, by what the layers declare."""
    devices = distribution.list_devices()[: options.devices]
    parts = 2 if options.devices % 2 == 0 else 1
    mesh = distribution.DeviceMesh(
        (options.devices // parts, parts), ("batch", "model"), devices
    )
    layout = make_layout_map(lambda: load(options, weights=False), mesh)
    distribution.set_distribution(
        distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    )


def read_passages(options):
    """Returns passages to train on, and some that are held out."""
    if options.quick:
        from pydoc_data.topics import topics

        text = topics["assert"] + topics["lambda"] + topics["pass"] + topics["del"]
    else:
        path = options.text_file or fetch.novel()
        text = path.read_text(encoding="utf-8")
        if options.text_file is None:
            text = text.split("*** START OF")[1].split("*** END OF")[0]
    lines = [x.strip() for x in text.split("\n")[1:]]
    size = 2 if options.quick else 12
    found = [" ".join(lines[i : i + size]) for i in range(0, len(lines), size)]
    count = len(found) // 20 + 1
    return found[:-count], found[-count:]


def make_optimizer(options):
    steps = options.steps * options.epochs
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=steps - steps // 10,
        warmup_target=2e-4,
        warmup_steps=steps // 10,
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.01, global_clipnorm=1.0)


class Crash(keras.callbacks.Callback):
    """Kills the process after so many steps, as a power cut would."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def train(options):
    """Trains, and returns what it was good for."""
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.devices > 1:
        on_devices(options)
    lm = load(options)
    lm.compile(make_optimizer(options), weighted_metrics=["accuracy", Perplexity()])
    texts, held_out = read_passages(options)
    packed = {"preprocessor": lm.preprocessor, "sequence_length": options.length}
    # Devices share the rows of each batch, so there is none of fewer rows.
    packed |= {"batch_size": options.batch, "drop_remainder": options.devices > 1}
    held_out = PackedDocuments(held_out, **packed)
    before = lm.evaluate(held_out, verbose=0, return_dict=True)["perplexity"]
    callbacks = [BackupAndResume(options.folder / "backup", save_freq=3)]
    if options.crash_at:
        callbacks.append(Crash(options.crash_at))
    history = lm.fit(
        PackedDocuments(texts, **packed),
        steps_per_epoch=options.steps,
        epochs=options.epochs,
        callbacks=callbacks,
        verbose=2,
    ).history
    after = lm.evaluate(held_out, verbose=0, return_dict=True)["perplexity"]
    print(f"perplexity of what was held out: {before:.3f} before, {after:.3f} after")
    if options.rank:
        lm.save_lora_weights(str(options.folder / "updates.lora.h5"))
    prompt = texts[0][:20]
    print(repr(lm.generate(prompt, max_new_tokens=16)))
    return {"loss": history["loss"][-1], "perplexity": after}


def compare(options):
    """Trains, and again in two processes, of which the first one is killed."""
    arguments = [x for x in sys.argv[1:] if x not in ("--crash", "--quick")]
    command = [sys.executable, __file__, *arguments, "--crash-at"]
    quick = ["--quick"] if options.quick else []

    def run(folder, step):
        place = [str(step), "--folder", str(folder), *quick]
        code = subprocess.run([*command, *place], check=False).returncode
        path = folder / "result.json"
        return json.loads(path.read_text()) if code == 0 else code

    with tempfile.TemporaryDirectory() as folder:
        options.folder = pathlib.Path(folder, "whole")
        whole = train(options)
        # In the second epoch, after a backup in the first.
        killed = run(pathlib.Path(folder, "killed"), options.steps + 1)
        assert killed == -signal.SIGKILL, killed
        resumed = run(pathlib.Path(folder, "killed"), 0)
    print(f"as a whole: {whole}\nkilled and resumed: {resumed}")
    for name, value in whole.items():
        assert abs(resumed[name] / value - 1) < 1e-6, name


def main():
    options = parse_arguments()
    if options.crash or (options.quick and options.crash_at is None):
        compare(options)
        return
    result = json.dumps(train(options))
    (options.folder / "result.json").write_text(result + "\n")


if __name__ == "__main__":
    main()
