"""Bad layers, scopes and models: each error says what is wrong and what to do."""

import keras
import pytest
from keras import ops

from attention import (
    AlibiBias,
    CachedLayer,
    CacheScope,
    CompositeCachedLayer,
    GroupedQueryAttention,
    MultiHeadAttention,
    NewCacheScope,
    PositionScheme,
    RelativePositionBias,
    call_sites,
    call_with_cache,
    create_cache,
)
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    assert_close,
    raises,
    sample,
    secret,
)


class Misbehaving(CachedLayer):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def create_cache(self, batch_size, max_length):
        return {"state": ops.zeros((batch_size, 4))}

    def call(self, x, cache=None, cache_update_index=None):
        return x if cache is None else self.result(x, cache)


@pytest.mark.parametrize(
    "result, kind, part",
    [
        (lambda x, c: x, TypeError, "(outputs, cache)"),
        (lambda x, c: (x, c, c), TypeError, "(outputs, cache)"),
        (lambda x, c: [x, c], TypeError, "(outputs, cache)"),
        (lambda x, c: (x, c["state"]), ValueError, "structure"),
        (lambda x, c: (x, {"other": c["state"]}), ValueError, "structure"),
        (lambda x, c: (x, {"state": c["state"][:, :2]}), ValueError, "(3, 2)"),
        (lambda x, c: (x, {"state": c["state"] > 0}), ValueError, "bool"),
        (lambda x, c: (x, ()), ValueError, "structure"),
    ],
)
def test_layers_that_return_another_cache(result, kind, part):
    layer = Misbehaving(result)
    x = secret(BATCH, 1, WIDTH)
    cache = {"state": ops.convert_to_tensor(secret(BATCH, 4))}
    with raises(kind, f"'{layer.name}'", part):
        layer(x, cache=cache, cache_update_index=0)


def test_methods_that_a_subclass_must_write():
    with raises(NotImplementedError, "create_cache(batch_size, max_length)"):
        CachedLayer().create_cache(1, 1)
    with raises(NotImplementedError, "transform(x, padding_mask=None"):
        CompositeCachedLayer()(sample())


def model_of(*layers):
    return keras.Sequential([keras.Input((None, WIDTH)), *layers])


def test_a_composite_layer_with_a_call_that_takes_no_cache():
    def call(self, x, padding_mask=None):
        return x

    with raises(TypeError, "`Bad.call`", "`cache`", "Override `transform`"):
        type("Bad", (CompositeCachedLayer,), {"call": call})

    class Passes(CompositeCachedLayer):
        def transform(self, x):
            return 2 * x

        def call(self, *args, **kwargs):
            return super().call(*args, **kwargs)

    x = sample()
    assert_close(Passes()(x), 2 * x)


def test_arguments_of_a_subclass():
    class Short(MultiHeadAttention):
        max_sequence_length = 3

    layer = Short(4, autocast=False)
    layer(secret(BATCH, 3, WIDTH))
    with raises(ValueError, f"'{layer.name}'", "3 positions", "position 4"):
        layer(secret(BATCH, 4, WIDTH))
    with raises(ValueError, "`autocast`", "inputs are cast"):
        CachedLayer(autocast=True)


def test_scopes_and_models_that_do_not_match():
    x = secret(BATCH, 4, WIDTH)
    one = model_of(MultiHeadAttention(4))
    two = model_of(MultiHeadAttention(4), MultiHeadAttention(4))
    cache = create_cache(one, BATCH, LENGTH)
    with raises(ValueError, "cached call number 2", "1 slots", "`create_cache`"):
        call_with_cache(two, x, cache, 0)
    cache = create_cache(two, BATCH, LENGTH)
    with raises(ValueError, "2 slots", "1 cached layers", "another model"):
        call_with_cache(one, x, cache, 0)
    with raises(ValueError, "was not made by layer"):
        call_with_cache(model_of(MultiHeadAttention(2)), x, cache[:1], 0)


def test_scopes_used_wrongly():
    model, x = model_of(MultiHeadAttention(4)), secret(BATCH, 4, WIDTH)
    cache = create_cache(model, BATCH, LENGTH)
    with raises(TypeError, "`cache` must be the tuple", "'key'"):
        CacheScope(cache[0], 0)
    with raises(ValueError, "cache_update_index=None", "processed"):
        CacheScope(cache, None)
    scope = CacheScope(cache, 0)
    with raises(ValueError, "`scope.cache`", "has ended"):
        scope.cache
    with scope:
        model(x)
        with raises(ValueError, "`scope.cache`", "has ended"):
            scope.cache
    assert len(scope.cache) == 1
    with raises(ValueError, "entered once", "`scope.cache`"), scope:
        pass
    failed = CacheScope(cache, 0)
    with pytest.raises(KeyError), failed:
        raise KeyError
    with raises(ValueError, "without an error"):
        failed.cache
    # The scope that failed is not active any more.
    assert tuple(model(x).shape) == x.shape


class Unbuilt(keras.Model):
    def __init__(self):
        super().__init__()
        self.attend = MultiHeadAttention(4)

    def call(self, x):
        return self.attend(x)


def test_models_without_what_a_cache_needs():
    with raises(TypeError, "`model` must be a Keras model", "model='gpt'"):
        create_cache("gpt", 1, 8)
    with raises(ValueError, "is not built", "Call it once"):
        create_cache(Unbuilt(), 1, 8)
    with raises(ValueError, "calls no cached layer", "`CachedLayer`"):
        create_cache(model_of(keras.layers.Dense(4)), 1, 8)
    model = Unbuilt()
    model(sample())
    with raises(ValueError, "Pass `inputs`"):
        call_sites(model)
    with raises(TypeError, "`batch_size`", "batch_size=1.0"):
        create_cache(model, 1.0, 8, sample())
    with raises(ValueError, "`max_length`", "max_length=0"):
        create_cache(model, 1, 0, sample())
    with raises(ValueError, "no weights yet", "before"), NewCacheScope(BATCH, 8):
        Unbuilt()(sample())


def test_a_scheme_shared_by_layers_with_other_numbers_of_heads():
    for shared in (RelativePositionBias(8, 10), AlibiBias()):
        MultiHeadAttention(4, position=shared)(sample())
        with raises(ValueError, "`position`", "4 heads", "num_heads=2"):
            MultiHeadAttention(2, position=shared)(sample())


def test_a_scheme_with_one_bias_for_all_heads():
    class Self(PositionScheme):
        def bias(self, query_positions, key_positions):
            same = query_positions[..., :, None] == key_positions[..., None, :]
            return ops.expand_dims(ops.cast(same, "float32"), -3)

    x, layer = sample(), GroupedQueryAttention(4, 2, position=Self())
    cache = layer(x) is not None and layer.create_cache(BATCH, LENGTH)
    layer(x[:, :4], cache=cache, cache_update_index=[0, 1, 2])


def test_a_layer_that_rounds_its_capacity_up():
    class Rounding(CachedLayer):
        def create_cache(self, batch_size, max_length):
            return ops.zeros((batch_size, -(-max_length // 128) * 128))

        def call(self, x, cache=None, cache_update_index=None):
            return x if cache is None else (x, cache)

    layer, x = Rounding(), sample()
    for length in (1, 200, 1000):
        layer(x, cache=layer.create_cache(BATCH, length), cache_update_index=0)
