"""Two right layers, as a user might write them, and faults to plant in them.

`self.fault` names the one mistake a layer makes; with `None` it is right. Neither
shares code with the library's own layers.
"""

import keras
import numpy as np
from keras import ops

from attention import CachedLayer


class Attend(CachedLayer):
    """Causal attention with rotary positions, a relative bias or a window."""

    def __init__(
        self, heads=2, rotary=False, bias=False, window=None, fault=None, **kwargs
    ):
        super().__init__(**kwargs)
        self.heads, self.rotary, self.bias = heads, rotary, bias
        self.window, self.fault = window, fault

    def build(self, inputs_shape):
        self.width = inputs_shape[-1]
        for name in ("query", "key", "value", "project"):
            dense = keras.layers.Dense(self.width, dtype=self.dtype_policy, name=name)
            dense.build(inputs_shape)
            setattr(self, name, dense)
        if self.bias:
            self.table = self.add_weight(
                name="table", shape=(self.heads, 64), initializer="random_normal"
            )
        if self.fault == "a table that is no weight":
            self.frozen = np.random.normal(size=(self.width,)).astype("float32")
        self.seen = 0

    def create_cache(self, batch_size, max_length):
        shape = (batch_size, max_length, self.heads, self.width // self.heads)
        if self.fault == "a cache that isn't batch first":
            shape = (max_length, batch_size, *shape[2:])
        return {name: ops.zeros(shape, self.compute_dtype) for name in ("key", "value")}

    def can_rewind(self, cache, from_index, to_index):
        return True

    def call(
        self,
        x,
        attention_mask=None,
        padding_mask=None,
        cache=None,
        cache_update_index=None,
    ):
        fault = self.fault
        length = ops.shape(x)[1]
        index = 0 if cache is None else cache_update_index
        if fault == "state on the layer" and cache is not None:
            index, self.seen = self.seen, self.seen + length
        if fault == "NumPy on an index":
            index = np.asarray(ops.convert_to_numpy(index))
        if fault == "one index for all rows":
            index = ops.max(index)
        steps = ops.arange(length)
        index = ops.convert_to_tensor(index, dtype="int32")
        positions = steps[None] + ops.reshape(index, (-1, 1))
        positions = ops.broadcast_to(positions, ops.shape(x)[:2])
        if fault == "a mean over the sequence":
            x = x - 0.1 * ops.mean(x, axis=1, keepdims=True)
        q, k, v = (
            ops.reshape(dense(x), (-1, length, self.heads, self.width // self.heads))
            for dense in (self.query, self.key, self.value)
        )
        if fault == "rows mixed up by a transpose":
            k, v = (
                ops.reshape(ops.transpose(t, (2, 0, 1, 3)), t.shape) for t in (k, v)
            )
        if self.rotary:
            later = ops.cast(index > 0, "int32") if cache is not None else 0
            later = ops.reshape(later, (-1, 1))
            shift = int(fault == "rotary offset of queries" and cache is not None)
            both = later if fault == "rotary offset of later calls" else 0
            q = rotate(q, positions + shift + both)
            k = rotate(k, positions + both)
        key_positions = steps[None]
        if cache is not None:
            cache = self.write(cache, k, v, positions, padding_mask)
            k, v = cache["key"], cache["value"]
            if fault == "the value's gradient stops":
                v = ops.stop_gradient(v)
            key_positions = ops.arange(k.shape[1])[None]
        outputs = self.attend(
            q, k, v, positions, key_positions, padding_mask, attention_mask, cache
        )
        outputs = self.project(ops.reshape(outputs, (-1, length, self.width)))
        if fault == "a table that is no weight":
            outputs = outputs + ops.convert_to_tensor(self.frozen, outputs.dtype)
        if fault == "the cache's dtype drifts" and cache is not None:
            cache = {**cache, "key": ops.cast(cache["key"], "float32")}
        return outputs if cache is None else (outputs, cache)

    def write(self, cache, k, v, positions, padding_mask):
        fault, capacity = self.fault, cache["key"].shape[1]
        slots = positions
        if fault == "a write that is moved to fit":
            slots = ops.minimum(
                slots, capacity - ops.shape(k)[1] + slots - slots[:, :1]
            )
        chosen = slots[..., None] == ops.arange(capacity)
        if padding_mask is not None and fault != "a write that is moved to fit":
            chosen = ops.logical_and(chosen, ops.cast(padding_mask, "bool")[..., None])
        written = ops.any(chosen, axis=1)[:, :, None, None]
        if fault == "the cache is changed in place":
            rows, tokens = ops.where(ops.any(chosen, axis=-1))
            for old, new in ((cache["key"], k), (cache["value"], v)):
                old[rows, slots[rows, tokens]] = new[rows, tokens].detach()
            return cache

        def update(old, new):
            new = ops.einsum("blc,blhd->bchd", ops.cast(chosen, new.dtype), new)
            if fault == "a write that adds to its slot":
                return old + new
            return ops.where(written, new, old)

        updated = {"key": update(cache["key"], k), "value": update(cache["value"], v)}
        if fault == "the value is not written":
            updated["value"] = cache["value"]
        return updated

    def attend(
        self, q, k, v, positions, key_positions, padding_mask, attention_mask, cache
    ):
        fault, masked = self.fault, -1e30
        if fault == "a mask aligned top left" and cache is not None:
            positions = positions - positions[:, :1]
        distance = positions[:, :, None] - key_positions[:, None, :]
        visible = distance >= (-1 if fault == "sees the next token" else 0)
        if self.window:
            off = int(fault == "a window wrong by one" and cache is not None)
            visible = ops.logical_and(visible, distance < self.window - off)
        if fault == "unfilled slots are attended" and cache is not None:
            unfilled = key_positions[:, None, :] > positions[:, -1:, None]
            visible = ops.logical_or(visible, unfilled)
        if cache is None and padding_mask is not None:
            visible = ops.logical_and(visible, ops.cast(padding_mask, "bool")[:, None])
        if attention_mask is not None and cache is None:
            visible = ops.logical_and(visible, attention_mask)
        scale = (self.width // self.heads) ** -0.5
        if fault == "a scale from the capacity":
            scale = scale * k.shape[1] / 10
        logits = ops.einsum("bqhd,bkhd->bhqk", q, k) * scale
        if fault == "a mask that overflows float16":
            masked = -1e9
        else:
            logits = ops.cast(logits, "float32")
        if self.bias:
            if fault == "a bias from the length of the query" and cache is not None:
                steps = ops.arange(ops.shape(q)[1])
                distance = steps[None, :, None] - key_positions[:, None, :]
            bias = ops.take(self.table, ops.clip(distance, 0, 63), axis=1)
            bias = ops.moveaxis(ops.convert_to_tensor(bias), 0, 1)
            logits = logits + ops.cast(bias, logits.dtype)
        if fault == "a mask of -inf":
            masked = -np.inf
        masked = ops.cast(masked, logits.dtype)
        weights = ops.softmax(ops.where(visible[:, None], logits, masked), axis=-1)
        return ops.einsum("bhqk,bkhd->bqhd", ops.cast(weights, v.dtype), v)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.fault == "a weight that is not saved":
            store["0"] = np.zeros_like(store["0"])

    def get_config(self):
        names = ("heads", "rotary", "bias", "window", "fault")
        own = {name: getattr(self, name) for name in names}
        config = {**super().get_config(), **own}
        if self.fault == "a config that forgets an argument":
            del config["window"]
        return config


def rotate(x, positions):
    """Rotary positions: `x` is `(batch, length, heads, dim)`."""
    half = x.shape[-1] // 2
    frequencies = 10.0 ** (-np.arange(half, dtype="float32"))
    angle = ops.cast(positions, "float32")[..., None, None] * frequencies
    cos, sin = (ops.cast(f(angle), x.dtype) for f in (ops.cos, ops.sin))
    a, b = x[..., :half], x[..., half:]
    return ops.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Leak(CachedLayer):
    """A recurrence with a float32 state: `s = decay * s + x`, computed at once."""

    def __init__(self, fault=None, **kwargs):
        super().__init__(**kwargs)
        self.fault = fault

    def build(self, inputs_shape):
        self.width = inputs_shape[-1]
        self.decay = self.add_weight(
            name="decay", shape=(self.width,), initializer="zeros", autocast=False
        )

    def create_cache(self, batch_size, max_length):
        return ops.zeros((batch_size, self.width), "float32")

    def can_rewind(self, cache, from_index, to_index):
        if self.fault == "a state that says it gives tokens back":
            return True
        return super().can_rewind(cache, from_index, to_index)

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        length = ops.shape(x)[1]
        decay = ops.sigmoid(ops.cast(self.decay, "float32"))
        if padding_mask is None or self.fault == "a padded token enters the state":
            padding_mask = ops.ones(ops.shape(x)[:2], "bool")
        real = ops.cast(padding_mask, "float32")
        inputs = ops.where(real[..., None] > 0, ops.cast(x, "float32"), 0.0)
        if self.fault == "a token is processed twice" and cache is not None:
            index = ops.convert_to_tensor(cache_update_index)
            later = ops.cast(ops.reshape(index, (-1, 1)) > 0, "float32")
            cache = cache * decay + later * inputs[:, 0] if length == 1 else cache
        # By the number of real tokens since: padded ones do not decay the state.
        count = ops.cumsum(real, axis=1)
        age = count[:, :, None] - count[:, None, :]
        if self.fault == "a mean over the batch":
            inputs = inputs - 0.1 * ops.mean(inputs, axis=0)
        past = ops.arange(length)[:, None] >= ops.arange(length)[None]
        weights = ops.where(past[None, ..., None], decay ** age[..., None], 0.0)
        states = ops.einsum("bqkw,bkw->bqw", weights, inputs)
        if cache is not None:
            states = states + cache[:, None] * decay ** count[..., None]
        outputs = ops.cast(ops.tanh(states), self.compute_dtype)
        return outputs if cache is None else (outputs, states[:, -1])

    def get_config(self):
        return {**super().get_config(), "fault": self.fault}
