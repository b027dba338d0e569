"""One forward pass: with a cache and without, every variant gives the same."""

import keras
import numpy as np
import pytest
from helpers import (
    ATTENTIONS,
    BATCH,
    LENGTH,
    VARIANTS,
    WIDTH,
    as_index,
    assert_close,
    compiled,
    gradients,
    make,
    run_chunks,
    sample,
    to_numpy,
)
from keras import ops, tree

from attention import (
    CachedLayer,
    GroupedQueryAttention,
    MultiHeadAttention,
    RotaryAttention,
)

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_attention = pytest.mark.parametrize("name", ATTENTIONS)
# Chunks are of 12, 4 or 1 tokens wherever possible: JAX compiles every operation
# anew for each shape. For the same reason, what can't differ between variants is
# tried on few of them.
few_variants = pytest.mark.parametrize(
    "name", ["rotary_grouped", "t5_grouped", "position_embedding", "composite"]
)
few_attentions = pytest.mark.parametrize("name", ["rotary_grouped", "t5_grouped"])
GARBAGE = np.array([np.nan, np.inf, 1e30])[:, None, None]


def with_garbage(x, mask):
    """Puts something else into the padded tokens of each row."""
    return np.where(mask[..., None], x, GARBAGE).astype("float32")


@every_variant
@pytest.mark.parametrize("kind", ["int", "scalar", "rows"])
def test_prefill_single_steps_and_a_chunk_equal_the_full_forward(name, kind):
    layer, x = make(name), sample()
    outputs, _ = run_chunks(layer, x, [4, 1, 1, 1, 1, 4], [kind])
    assert_close(outputs, layer(x))


@few_variants
def test_chunks_of_random_sizes_equal_the_full_forward(name):
    rng = np.random.default_rng(sorted(VARIANTS).index(name))
    layer, x = make(name), sample()
    sizes = [int(size) for size in rng.permutation([1, 1, 2, 4, 4])]
    kinds = [str(kind) for kind in rng.permutation(["int", "scalar", "rows"])]
    outputs, _ = run_chunks(layer, x, sizes, kinds)
    assert_close(outputs, layer(x))


@few_variants
def test_single_steps_from_an_empty_cache(name):
    layer, x = make(name), sample()
    outputs, _ = run_chunks(layer, x, [1] * 12, ["int", "rows", "scalar"])
    assert_close(outputs, layer(x))


@every_variant
def test_ragged_rows_continue_as_each_would_alone(name):
    layer, x = make(name), sample()
    full = to_numpy(layer(x))
    lengths = np.array([2, 4, 3])
    mask = np.arange(4)[None] < lengths[:, None]
    prompts = with_garbage(x[:, :4], mask)
    # An int and an entry per row take different ways through the cache.
    for kind in ("int", "rows"):
        cache = layer.create_cache(BATCH, LENGTH)
        outputs, cache = layer(
            prompts,
            padding_mask=mask,
            cache=cache,
            cache_update_index=as_index(kind, 0),
        )
        assert_close(to_numpy(outputs)[mask], full[:, :4][mask])
        index = lengths.copy()
        for _ in range(2):
            token = x[np.arange(BATCH), index][:, None]
            outputs, cache = layer(token, cache=cache, cache_update_index=index)
            assert_close(outputs[:, 0], full[np.arange(BATCH), index])
            index += 1
    if name not in ("position_embedding", "composite"):
        assert all(np.isfinite(to_numpy(leaf)).all() for leaf in tree.flatten(cache))


@every_variant
def test_a_padded_chunk_that_reaches_past_the_end_overwrites_nothing(name):
    layer, x = make(name), sample()
    full = to_numpy(layer(x))
    starts, new = np.array([9, 11, 8]), np.array([3, 1, 4])
    mask = np.arange(4)[None] < new[:, None]
    columns = np.minimum(starts[:, None] + np.arange(4)[None], LENGTH - 1)
    chunk = np.take_along_axis(x, columns[..., None], axis=1)
    chunk = with_garbage(chunk, mask)
    # Bring each row to its start: all to 8, then ragged.
    _, cache = run_chunks(layer, x[:, :8], [4, 4])
    up_to = np.arange(4)[None] < (starts - 8)[:, None]
    _, cache = layer(
        x[:, 8:12], padding_mask=up_to, cache=cache, cache_update_index=np.full(3, 8)
    )
    outputs, cache = layer(
        chunk, padding_mask=mask, cache=cache, cache_update_index=starts
    )
    for row in range(BATCH):
        assert_close(outputs[row, : new[row]], full[row, starts[row] :])
    # The cache is full now; what it holds is still the whole sequence.
    last, _ = layer(x[:, -1:], cache=cache, cache_update_index=LENGTH - 1)
    assert_close(last[:, 0], full[:, -1])


@few_attentions
@pytest.mark.parametrize("kind", ["int", "scalar"])
def test_rows_at_one_position_with_padding_past_the_end(name, kind):
    layer, x = make(name), sample()
    _, cache = run_chunks(layer, x[:, :10], [4, 4, 1, 1])
    mask = np.tile(np.arange(4) < 2, (BATCH, 1))
    chunk = np.concatenate([x[:, 10:], np.full((BATCH, 2, WIDTH), np.inf)], axis=1)
    outputs, _ = layer(
        chunk.astype("float32"),
        padding_mask=mask,
        cache=cache,
        cache_update_index=as_index(kind, 10),
    )
    assert_close(outputs[:, :2], layer(x)[:, 10:])


@every_variant
def test_what_stands_in_padded_tokens_is_not_seen_without_a_cache(name):
    layer, x = make(name), sample()
    mask = np.arange(LENGTH)[None] < np.array([11, 5, 1])[:, None]
    outputs = to_numpy(layer(with_garbage(x, mask), padding_mask=mask))
    assert_close(outputs[mask], to_numpy(layer(x))[mask])


def test_a_row_among_others_equals_the_row_alone():
    layer, x = make("rotary_grouped"), sample()
    mask = np.arange(LENGTH)[None] < np.array([11, 5, 1])[:, None]
    outputs = layer(with_garbage(x, mask), padding_mask=mask)
    assert_close(outputs[1, :5], layer(x[1:2, :5])[0])


def test_padded_tokens_are_not_seen_by_a_layer_that_is_not_causal():
    layer = MultiHeadAttention(4, causal=False)
    x = sample()
    mask = np.arange(LENGTH)[None] < np.array([11, 5, 1])[:, None]
    outputs = layer(with_garbage(x, mask), padding_mask=mask)
    assert_close(outputs[1, :5], layer(x[1:2, :5])[0])


@every_variant
def test_a_row_of_padding_alone_is_finite_and_moves_nothing(name):
    layer, x = make(name), sample()
    mask = np.ones((BATCH, 4), bool)
    mask[1] = False
    _, cache = run_chunks(layer, x[:, :4], [4])
    index = np.array([4, 4, 4])
    outputs, cache = layer(
        x[:, 4:8], padding_mask=mask, cache=cache, cache_update_index=index
    )
    assert np.isfinite(to_numpy(outputs)).all()
    assert np.isfinite(to_numpy(layer(x[:, 4:8], padding_mask=mask))).all()
    index = np.array([8, 4, 8])
    token = x[np.arange(BATCH), index][:, None]
    outputs, _ = layer(token, cache=cache, cache_update_index=index)
    assert_close(outputs[:, 0], to_numpy(layer(x))[np.arange(BATCH), index])


@few_variants
def test_a_cache_is_never_changed_in_place(name):
    layer, x = make(name), sample()
    _, cache = run_chunks(layer, x[:, :4], [4])
    before = tree.map_structure(lambda t: to_numpy(t).copy(), cache)
    for kind in ("int", "scalar", "rows"):
        layer(x[:, 4:5], cache=cache, cache_update_index=as_index(kind, 4))
        layer(
            x[:, 4:8],
            padding_mask=np.ones((BATCH, 4), bool),
            cache=cache,
            cache_update_index=as_index(kind, 4),
        )
    tree.map_structure(lambda a, b: assert_close(a, b, atol=0), cache, before)


@few_variants
def test_grow_cache_keeps_the_past(name):
    layer, x = make(name), sample()
    _, cache = run_chunks(layer, x[:, :4], [4], capacity=4)
    cache = layer.grow_cache(cache, LENGTH)
    expected = layer.create_cache(BATCH, LENGTH)
    tree.map_structure(
        lambda a, b: assert_close(ops.shape(a), ops.shape(b)), cache, expected
    )
    outputs, _ = layer(x[:, 4:5], cache=cache, cache_update_index=4)
    assert_close(outputs, layer(x)[:, 4:5])


@few_attentions
def test_rewinding_a_cache_forgets_what_came_after(name):
    layer, x = make(name), sample()
    _, cache = run_chunks(layer, sample(seed=7), [LENGTH])
    _, cache = layer(x[:, :4], cache=cache, cache_update_index=0)
    outputs, _ = layer(x[:, 4:5], cache=cache, cache_update_index=4)
    assert_close(outputs, layer(x)[:, 4:5])


@every_variant
def test_no_token_sees_a_later_one(name):
    layer, x = make(name), sample()
    changed = x.copy()
    changed[:, 7:] += 10.0
    assert_close(layer(changed)[:, :7], layer(x)[:, :7], atol=1e-6)


def random_mask(seed=3):
    mask = np.random.default_rng(seed).random((BATCH, LENGTH, LENGTH)) < 0.6
    mask[0, 6] = False  # a query that may attend to nothing
    mask[1, 4] = False
    mask[1, 4, 9] = True  # a query that may attend to a later token only
    return mask


@every_attention
def test_attention_mask_with_a_cache_and_without(name):
    layer, x, mask = make(name), sample(), random_mask()
    full = to_numpy(layer(x, attention_mask=mask))
    assert np.isfinite(full).all()
    for kind in ("int", "scalar", "rows"):
        cache, outputs = layer.create_cache(BATCH, LENGTH), []
        for start, size in ((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1)):
            rows = slice(start, start + size)
            chunk, cache = layer(
                x[:, rows],
                # Its columns count positions; those not reached play no role.
                attention_mask=mask[:, rows, : 8 if start < 8 else LENGTH],
                cache=cache,
                cache_update_index=as_index(kind, start),
            )
            outputs.append(to_numpy(chunk))
        assert_close(np.concatenate(outputs, axis=1), full)


def test_a_query_that_may_attend_to_nothing_leaks_nothing():
    layer, x, mask = make("multi_head"), sample(), random_mask()
    changed = x.copy()
    changed[:, 7:] += 10.0
    outputs = [to_numpy(layer(v, attention_mask=mask)) for v in (x, changed)]
    assert_close(outputs[0][:, :7], outputs[1][:, :7])
    scored, scores = layer(x, attention_mask=mask, return_attention_scores=True)
    assert_close(scored, outputs[0])
    assert_close(scores[0, :, 6], np.zeros((4, LENGTH)))
    assert_close(scored[0, 6], layer.output_dense.bias)


@every_attention
def test_attention_scores_with_a_cache_and_without(name):
    layer, x = make(name), sample()
    outputs, scores = layer(x, return_attention_scores=True)
    assert_close(outputs, layer(x))
    heads = layer.num_heads
    assert tuple(scores.shape) == (BATCH, heads, LENGTH, LENGTH)
    assert_close(ops.sum(scores, axis=-1), np.ones((BATCH, heads, LENGTH)))
    assert_close(scores, np.tril(to_numpy(scores)), atol=0)
    cache = layer.create_cache(BATCH, LENGTH)
    (head, head_scores), cache = layer(
        x[:, :4], cache=cache, cache_update_index=0, return_attention_scores=True
    )
    (tail, tail_scores), cache = layer(
        x[:, 4:5], cache=cache, cache_update_index=4, return_attention_scores=True
    )
    assert_close(head, outputs[:, :4])
    assert_close(tail, outputs[:, 4:5])
    assert_close(head_scores, scores[:, :, :4])
    assert_close(tail_scores, scores[:, :, 4:5])


@every_attention
def test_fused_attention_equals_the_explicit_one(name):
    layer, x = make(name), sample()
    mask = np.arange(LENGTH)[None] < np.array([12, 5, 1])[:, None]
    both = {"padding_mask": mask, "attention_mask": random_mask()}
    for given in ({}, both):
        fused = to_numpy(layer(x, **given))
        # The scores are asked for, so the fused kernel can't be used.
        explicit, _ = layer(x, return_attention_scores=True, **given)
        assert_close(fused[mask], to_numpy(explicit)[mask])


@pytest.mark.parametrize(
    "name, policy",
    [
        ("rotary_grouped", "mixed_bfloat16"),
        ("t5", "bfloat16"),
        ("alibi", "float16"),
    ],
)
def test_low_precision_stays_near_float32(name, policy):
    reference, x = make(name), sample()
    keras.config.set_dtype_policy(policy)
    layer = make(name)
    full = layer(x)
    assert keras.backend.standardize_dtype(full.dtype) == layer.compute_dtype
    exact = to_numpy(reference(x))
    bound = (0.005 if policy == "float16" else 0.05) * np.abs(exact).max()
    assert_close(full, exact, atol=bound)
    outputs, cache = run_chunks(layer, x, [4, 4, 4])
    assert_close(outputs, exact, atol=bound)
    dtypes = {keras.backend.standardize_dtype(c.dtype) for c in tree.flatten(cache)}
    assert dtypes == {layer.compute_dtype}
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1] = False
    masked = layer(x, padding_mask=mask, attention_mask=random_mask())
    assert np.isfinite(to_numpy(masked)).all()


def test_float16_products_do_not_overflow():
    layer = GroupedQueryAttention(1, 1, key_dim=64, dtype="float16")
    x = np.full((1, 2, WIDTH), 8.0, "float32")
    layer.build(x.shape)
    for dense in (layer.query_dense, layer.key_dense):
        dense.kernel.assign(np.full(dense.kernel.shape, 0.3))
    # 64 products of 38 * 38: more than float16 can hold before they are scaled.
    assert np.isfinite(to_numpy(layer(x))).all()


@pytest.mark.parametrize(
    "name", ["multi_head", "t5_grouped", "alibi_grouped_6", "composite"]
)
def test_compiled_equals_eager(name):
    layer, x = make(name), sample()
    _, cache = run_chunks(layer, x[:, :4], [4])

    @compiled
    def step(token, cache, index):
        return layer(token, cache=cache, cache_update_index=index)

    full = layer(x)
    for kind in ("scalar", "rows"):
        # The same compiled function for all positions.
        current = cache
        for i in (4, 5):
            outputs, current = step(
                ops.convert_to_tensor(x[:, i : i + 1]), current, as_index(kind, i)
            )
            assert_close(outputs, full[:, i : i + 1])


@pytest.mark.parametrize("name", ["t5", "position_embedding"])
def test_gradients_are_finite_whatever_the_padding_holds(name):
    layer, x = make(name), sample()
    mask = np.arange(LENGTH)[None] < np.array([11, 5, 0])[:, None]
    padded = ops.convert_to_tensor(with_garbage(x, mask))
    values = gradients(layer, padded, padding_mask=mask)
    assert len(values) == len(layer.trainable_variables)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in values)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_dropout_only_in_training(heads):
    layer, x = GroupedQueryAttention(*heads, dropout=0.5), sample()
    plain = to_numpy(layer(x))
    assert_close(layer(x, training=False), plain)
    dropped = to_numpy(layer(x, training=True))
    assert np.abs(dropped - plain).max() > 1e-3
    assert np.abs(to_numpy(layer(x, training=True)) - dropped).max() > 1e-3
    # The scores that are returned are those before dropout.
    _, scores = layer(x, training=True, return_attention_scores=True)
    assert_close(ops.sum(scores, axis=-1), np.ones((BATCH, 4, LENGTH)))


def test_arguments_may_be_given_by_keyword_in_any_order():
    layer, x = make("multi_head"), sample()
    mask = np.ones((1, 4, 4), bool)  # a batch axis of 1 serves all rows
    cache = layer.create_cache(BATCH, LENGTH)
    outputs, cache = layer(
        attention_mask=mask, query=x[:, :4], cache=cache, cache_update_index=0
    )
    assert_close(outputs, layer(x)[:, :4])


class RunningMean(CachedLayer):
    """A recurrence with a float32 state, whatever it computes in."""

    def build(self, inputs_shape):
        self.width = inputs_shape[-1]

    def create_cache(self, batch_size, max_length):
        return {
            "sum": ops.zeros((batch_size, self.width), "float32"),
            "count": ops.zeros((batch_size,), "int32"),
        }

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        real = ops.ones(ops.shape(x)[:2], "bool") if padding_mask is None else None
        real = ops.cast(padding_mask, "bool") if real is None else real
        x = ops.where(real[..., None], ops.cast(x, "float32"), 0.0)
        state = self.create_cache(ops.shape(x)[0], 1) if cache is None else cache
        total = state["sum"][:, None] + ops.cumsum(x, axis=1)
        count = state["count"][:, None] + ops.cumsum(ops.cast(real, "int32"), axis=1)
        outputs = total / ops.cast(ops.maximum(count, 1), "float32")[..., None]
        outputs = ops.cast(outputs, self.compute_dtype)
        cache = None if cache is None else {"sum": total[:, -1], "count": count[:, -1]}
        return outputs if cache is None else (outputs, cache)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_recurrence_keeps_the_dtypes_of_its_state(dtype):
    layer, x = RunningMean(dtype=dtype), sample()
    full = layer(x)
    outputs, cache = run_chunks(layer, x, [4, 1, 1, 4, 2], ["int", "rows", "scalar"])
    assert_close(outputs, full, atol=1e-5 if dtype == "float32" else 1e-2)
    assert keras.backend.standardize_dtype(cache["sum"].dtype) == "float32"
    assert keras.backend.standardize_dtype(cache["count"].dtype) == "int32"


def test_a_shared_scheme_of_positions_is_one_set_of_weights():
    from attention import RelativePositionBias

    shared = RelativePositionBias(8, 10)
    layers = [MultiHeadAttention(4, position=shared) for _ in range(2)]
    x = sample()
    for layer in layers:
        full = layer(x)
        outputs, _ = run_chunks(layer, x, [4, 4, 4])
        assert_close(outputs, full)
    assert layers[0].position.embeddings is layers[1].position.embeddings


def test_rotary_positions_are_relative():
    """Scores depend on distances alone, so a shifted sequence has the same."""
    layer, x = RotaryAttention(4, 2), sample(length=4)
    _, scores = layer(x, return_attention_scores=True)
    cache = layer.create_cache(BATCH, LENGTH)
    hidden = np.zeros((BATCH, 4, LENGTH), bool)
    hidden[:, :, 5:9] = True
    (_, shifted), _ = layer(
        x,
        attention_mask=hidden,
        cache=cache,
        cache_update_index=5,
        return_attention_scores=True,
    )
    assert_close(shifted[..., 5:9], scores)
