"""The public steps of generation, and what a compiled step does to memory."""

import dataclasses
import functools
import re

import keras
import numpy as np
import pytest
from keras import ops, tree

from attention import LatentAttention, RotaryAttention
from blocks import CausalLM, CustomBackbone, GenerationSizes, GenerationState
from blocks.generation import engine
from blocks.generation.compilation import StepKey
from tests.helpers import assert_close, compiled, raises, slow
from tests.models import (
    RAGGED,
    SMALL_SIZES,
    brute_force_greedy,
    check_generation,
    generated,
    make_backbone,
    make_lm,
    make_small_lm,
    make_variant,
    next_token_logits,
    prompts,
    to_numpy,
)

BACKEND = keras.config.backend()


@functools.cache
def shared_lm(kind):
    """One for all tests that leave it as it is, as each is compiled."""
    return make_lm(make_variant(kind))


@pytest.mark.parametrize("kind", ["gqa", *map(slow, ("mha", "rotary", "leak"))])
@pytest.mark.parametrize("how", ["eager", "compiled", "donated"])
def test_a_loop_of_the_users_own(kind, how):
    lm = shared_lm(kind)
    step = {
        "eager": lm.decode_step,
        "compiled": compiled(lambda tokens, state: lm.decode_step(tokens, state)),
        "donated": functools.partial(lm.decode_step, donate=True),
    }[how]
    rows = [list(row) for row in RAGGED]
    state = lm.prefill(prompts(rows), max_length=20)
    for _ in range(6):
        tokens = ops.cast(ops.argmax(state.logits, axis=-1), "int32")
        for row, token in zip(rows, to_numpy(tokens)):
            row.append(int(token))
        _, state = step(tokens, state)
    assert rows == brute_force_greedy(lm, RAGGED, max_new_tokens=6)
    assert to_numpy(state.cache_update_index).tolist() == [len(row) for row in rows]
    assert_close(state.logits, next_token_logits(lm, rows, 20), atol=1e-4)


def test_a_state_is_a_pytree_that_does_not_change():
    lm = shared_lm("mha")
    first = lm.prefill(prompts(RAGGED), max_length=12)
    assert isinstance(first, GenerationState)
    before = [to_numpy(x).copy() for x in tree.flatten(first)]
    again = tree.map_structure(lambda x: x, first)
    assert isinstance(again, GenerationState)
    a, _ = lm.decode_step(np.array([1, 2, 3]), first)
    lm.decode_step(np.array([4, 5, 6]), first)
    b, _ = lm.decode_step(np.array([1, 2, 3]), again)
    np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    for old, leaf in zip(before, tree.flatten(first)):
        np.testing.assert_array_equal(old, to_numpy(leaf))


def test_errors_of_steps(lm):
    for length, *words in ((5, "7 tokens", "5"), (65, "64", "65"), (0, "`max_length`")):
        with raises(ValueError, *words):
            lm.prefill(prompts(RAGGED), max_length=length)
    state = lm.prefill(prompts(RAGGED), max_length=8)
    with raises(TypeError, "`state`", "prefill"):
        lm.decode_step(np.array([1, 2, 3]), tuple(state))
    for tokens, kind, *words in (
        ([1, 2], ValueError, "`tokens`", "3 rows", "(2,)"),
        ([1.0, 2.0, 3.0], TypeError, "`tokens`", "integers"),
        ([1, 60, 3], ValueError, "Token 60"),
    ):
        with raises(kind, *words):
            lm.decode_step(np.array(tokens), state)
    _, state = lm.decode_step(np.array([1, 2, 3]), state)
    with raises(ValueError, "8 tokens", "8 positions", "`max_length`"):
        lm.decode_step(np.array([1, 2, 3]), state)
    if BACKEND != "torch":
        # In a compiled function the logits of a full row are NaN.
        step = compiled(lambda tokens, state: lm.decode_step(tokens, state))
        logits, _ = step(ops.convert_to_tensor(np.array([1, 2, 3], "int32")), state)
        full = np.isnan(to_numpy(logits)).all(axis=-1)
        assert full.tolist() == [False, True, False]


# === Sizes of chunks and caches ===


def test_capacities_and_chunks():
    sizes = GenerationSizes()
    capacities = [sizes.round_up_capacity(n) for n in range(1, 5000)]
    found = sorted(set(capacities))
    assert found == [144, 288, 576, 864, 1152, 1728, 2304, 3456, 4608, 6912]
    assert all(n <= x < 2 * max(n, 72.5) for n, x in enumerate(capacities, 1))
    chunks = [sizes.chunk_length(1, c) for c in (8, 128, 1024, 10**5)]
    assert chunks == [8, 32, 256, 512]
    # A long prompt of many rows is bounded, too.
    assert [sizes.chunk_length(rows, 10**5) for rows in (8, 10**4)] == [128, 32]
    with raises(ValueError, "`min_chunk`", "0"):
        GenerationSizes(min_chunk=0)


@pytest.mark.parametrize("kind", ["rotary", *map(slow, ("mha", "t5"))])
def test_long_prompts_are_processed_in_chunks(kind, calls_of):
    lm = make_small_lm(make_variant(kind))
    rows = [[(7 * i + j) % 60 for i in range(n)] for j, n in enumerate((30, 1, 13, 16))]
    calls = calls_of(engine.Engine, "hidden_states")
    check_generation(lm, rows, max_new_tokens=5)
    widths = {tokens.shape[1] for tokens, mask in calls}
    # A fourth of a cache of 48, not of the prompt's 30; and single tokens.
    assert max(widths) <= 12
    assert 1 in widths


def test_short_prompts_do_not_wait_for_long_ones(calls_of):
    sizes = dataclasses.replace(SMALL_SIZES, min_tokens_saved=8)
    lm = make_lm(make_backbone(), generation_sizes=sizes)
    calls = calls_of(engine.Engine, "process")
    rows = [[1, 2], list(range(1, 31)), [5, 6, 7], [8]]
    check_generation(lm, rows, max_new_tokens=6)
    found = [(capacity, lengths.tolist()) for _, capacity, _, _, lengths, *_ in calls]
    assert found == [(8, [1, 2, 3]), (32, [30])]


# === Compiled steps ===


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing")
def test_few_compilations_for_many_lengths(monkeypatch):
    warned = []
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # Of frequent retracing, for instance.
        monkeypatch.setattr(
            tf.get_logger(), "warning", lambda *args: warned.append(args)
        )
    lm = make_lm(make_backbone(max_sequence_length=1024, num_layers=1))
    for length in np.linspace(1, 512, 50).astype(int):
        generated(lm, [np.arange(length) % 60], max_new_tokens=8)
    assert 0 < lm.compilations <= 8
    assert warned == []


MIXERS = {
    "window": lambda heads: RotaryAttention(heads, 2, window=320),
    # No kernel is as large as the hidden states of 4 rows.
    "latent": lambda heads: LatentAttention(heads, rotary_dim=6),
}


def make_mixer(kind, **overrides):
    if kind not in MIXERS:
        return make_variant(kind, **overrides)

    class Backbone(CustomBackbone):
        def create_attention_layer(self, inputs_shape, layer_index):
            return MIXERS[kind](self.num_heads)

    return make_backbone(Backbone, learned_positions=False, **overrides)


def while_bodies(hlo):
    """The computations of a compiled module that are run again and again."""
    names = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    blocks = re.split(r"\n(?=\S.*\{\n)", hlo)
    found = [b for b in blocks if b.split("(")[0].split()[0].lstrip("%") in names]
    assert len(found) == len(names) > 0
    return found


@pytest.mark.optimized
@pytest.mark.skipif(BACKEND != "jax", reason="looks at what JAX compiles")
@pytest.mark.parametrize("batch_size, rows_differ", [(1, False), (4, True)])
@pytest.mark.parametrize("kind", ["mha", "gqa", "rotary", "window", "latent"])
def test_a_decode_step_moves_no_cache_and_no_kernel(kind, rows_differ, batch_size):
    capacity = 640
    lm = CausalLM(make_mixer(kind, hidden_dim=32))
    lm.compile(sampler="greedy")
    generated(lm, [[1]], max_new_tokens=2)
    steps = lm._engine()
    decode = steps.functions.get(
        StepKey("decode", batch_size, capacity),
        steps.make_decode,
        donate=(0,),
        sampling=steps.sampling(),
    )
    cache = steps.create_cache(batch_size, capacity)
    shape = (batch_size,)
    arguments = tree.map_structure(
        ops.convert_to_tensor,
        (
            cache,
            np.zeros(shape, "int32"),
            np.zeros(shape if rows_differ else (), "int32"),
            np.full(shape, 9, "int32"),
            (),  # no processors
            np.zeros(shape, "bool"),
            np.int32(9),
            np.full((8,), -1, "int32"),
            {"temperature": np.float32(1.0)},
        ),
    )
    hlo = decode.jitted.lower(decode.values(), *arguments).compile().as_text()
    # Every part of the cache that comes in goes out in the same memory.
    alias = re.search(r"input_output_alias=\{(.*?)\}, entry", hlo).group(1)
    assert alias.count("may-alias") >= len(tree.flatten(cache))
    shapes = [tuple(x.shape) for x in tree.flatten(cache)]
    largest = max(int(np.prod(shape)) for shape in shapes)
    kernels = {
        int(np.prod(w.shape))
        for w in lm.weights
        if w.path.endswith(("/kernel", "/key_up", "/value_up"))
    }
    written = 0
    for line in "\n".join(while_bodies(hlo)).splitlines():
        made = re.match(
            r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]+)\]\S* ([\w\-]+)\(", line
        )
        if not made:
            continue
        name, dims, operation = made.groups()
        shape = tuple(int(x) for x in dims.split(","))
        # Inputs, and the same memory by another name, cost nothing.
        if operation in ("get-tuple-element", "parameter", "bitcast"):
            continue
        in_place = "dynamic-update-slice" in name and shape in shapes
        written += in_place
        # Nothing else is as large: no copy of a cache, no grouped head expanded.
        assert in_place or np.prod(shape) < largest, line
        # And no kernel is transposed in every step.
        assert int(np.prod(shape)) not in kernels, line
    assert written >= len(shapes)
