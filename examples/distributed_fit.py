"""Train and generate on several devices: data parallel, model parallel, both.

    python examples/distributed_fit.py            # about 3 minutes
    python examples/distributed_fit.py --quick    # about a minute

JAX only. Without accelerators there are 8 simulated devices on the CPU, which show that
the results are the same, not how fast it is. The layout of the weights comes from what
layers declare. With several processes, such as one for each machine, start this on each:

    python examples/distributed_fit.py --address 10.0.0.1:1234 --processes 2 --process 0
"""

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Read when JAX starts; devices that are no CPUs are not affected.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from keras import distribution, tree

from attention import RotaryAttention
from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone, make_layout_map


@keras.saving.register_keras_serializable("distributed_fit")
class Backbone(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return RotaryAttention(self.num_heads, num_key_value_heads=4)


def make_model(quick):
    # The same weights in each process and on any number of devices.
    keras.utils.set_random_seed(0)
    backbone = Backbone(
        vocabulary_size=256,
        num_layers=1 if quick else 4,
        num_heads=8,
        hidden_dim=64 if quick else 128,
        intermediate_dim=128 if quick else 512,
        learned_positions=False,
    )
    lm = CausalLM(backbone)
    # A checkpoint finds the optimizer's state by its name.
    optimizer = keras.optimizers.SGD(0.3, momentum=0.9, name="optimizer")
    lm.compile(optimizer, sampler="greedy")
    return lm


def make_distribution(kind, make):
    """Returns what Keras lays weights and data out by."""
    devices = distribution.list_devices()
    if kind == "data parallel":  # all weights on each device, a part of each batch
        return distribution.DataParallel(devices=devices)
    parts = min(4, len(devices))  # the devices that share the weights
    if kind == "model parallel":
        devices = devices[:parts]
    shape = (len(devices) // parts, parts)
    mesh = distribution.DeviceMesh(shape, ("batch", "model"), devices)
    return distribution.ModelParallel(
        layout_map=make_layout_map(make, mesh), batch_dim_name="batch"
    )


def load_data(count):
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    texts = [text[i * 64 : (i + 1) * 64] for i in range(count)]
    tokenizer = keras_hub.tokenizers.ByteTokenizer()
    preprocessor = CausalLMPreprocessor(tokenizer, sequence_length=64, end_token=0)
    # Batches of arrays, whose size TensorFlow knows: each process takes its rows.
    arrays = tree.map_structure(np.array, preprocessor(texts))
    return tf.data.Dataset.from_tensor_slices(arrays).batch(16, drop_remainder=True)


def train(kind, quick, alone):
    def make():
        return make_model(quick)

    distribution.set_distribution(None if alone else make_distribution(kind, make))
    lm = make()
    start = time.perf_counter()
    history = lm.fit(load_data(64 if quick else 1024), verbose=0).history
    prompt = [list(b"The following ")]
    found = lm.generate(prompt, max_new_tokens=8 if quick else 32, stop_token_ids=None)
    text = bytes(np.array(found["token_ids"])[0].astype("uint8")).decode()
    held = sum(shard_bytes(weight) for weight in lm.weights)
    print(
        f"{kind}: loss {history['loss'][-1]:.6f}, {held / 2**10:.0f} KiB of weights on "
        f"the first device, {time.perf_counter() - start:.0f} s; {text!r}",
        flush=True,
    )
    return history["loss"][-1], text


def shard_bytes(weight):
    shards = weight.value.addressable_shards
    return np.prod(shards[0].data.shape) * shards[0].data.dtype.itemsize


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--address", help="host and port of the first process")
    parser.add_argument("--processes", type=int, help="how many processes there are")
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    args = parser.parse_args()
    if keras.backend.backend() != "jax":
        parser.error("`keras.distribution` needs KERAS_BACKEND=jax")
    if args.address:
        distribution.initialize(args.address, args.processes, args.process)
    kinds = ["data parallel", "model parallel and data parallel"]
    if not args.address:  # these need one process
        kinds = ["one device", "data parallel", "model parallel", kinds[1]]
    results = [train(kind, args.quick, kind == "one device") for kind in kinds]
    for loss, text in results[1:]:
        assert abs(loss - results[0][0]) < 1e-4, (loss, results[0])
        assert text == results[0][1]
    print("the same losses and texts")


if __name__ == "__main__":
    main()
