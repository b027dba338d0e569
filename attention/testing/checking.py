"""The checks of layers and models, and the order in which they are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import tree

from attention.contract.arguments import check_number, describe
from attention.contract.cached_layer import CachedLayer
from attention.contract.types import DType
from attention.testing.backends import full_precision, has_compiler
from attention.testing.contract_checks import (
    check_cache,
    check_causality,
    check_rows,
    check_state,
)
from attention.testing.equality_checks import (
    check_capacity,
    check_chunks,
    check_positions,
    check_prefill_and_steps,
)
from attention.testing.numeric_checks import (
    check_compiled,
    check_gradients,
    check_low_precision,
)
from attention.testing.packing_check import check_packing, packs
from attention.testing.padding_checks import check_masked_rows, check_padding
from attention.testing.probe import Probe
from attention.testing.rewind_check import check_rewind
from attention.testing.running import run_in_order, select
from attention.testing.saving_checks import check_config, check_saving
from attention.testing.subjects import ModelSubject, Subject

# A mistake often fails several checks. The ones that say most about it come first.
CHECKS: dict[str, Callable[[Probe], None]] = {
    "cache": check_cache,
    "state": check_state,
    "rows": check_rows,
    "causality": check_causality,
    "prefill_and_steps": check_prefill_and_steps,
    "chunks": check_chunks,
    "positions": check_positions,
    "masked_rows": check_masked_rows,
    "padding": check_padding,
    "capacity": check_capacity,
    "rewind": check_rewind,
    "packing": check_packing,
    "compiled": check_compiled,
    "low_precision": check_low_precision,
    "gradients": check_gradients,
    "config": check_config,
    "saving": check_saving,
}


def run_checks(
    subject: Subject, checks: Any, tolerance: float | None
) -> dict[str, float]:
    """Runs checks in order and returns the largest difference each found."""
    names = select(checks, CHECKS)
    subject.tolerance = check_number("tolerance", tolerance, none="rounding") or 0.0
    if subject.batch_size < 2 or subject.length < 8:
        raise ValueError(
            "`batch_size` must be at least 2 and `max_length` at least 8, or there "
            f"is little to compare. Received: batch_size={subject.batch_size}, "
            f"max_length={subject.length}"
        )
    with full_precision():
        subject.made = subject.new()
        if subject.make() is subject.made:
            raise ValueError(
                f"`{subject.argument}` returned the same object twice. Make the layer "
                "inside of it: `lambda: MyLayer(4)`."
            )
        limit = subject.limit(subject.made)
        if limit is not None and limit < subject.length:
            raise ValueError(
                f"{subject} can represent {limit} positions. Pass `max_length` of at "
                f"most {limit}. Received: max_length={subject.length}"
            )
        probe = Probe(subject, subject.made)
        possible = {"compiled": has_compiler, "packing": lambda: packs(subject.sites())}
        names = [x for x in names if x not in possible or possible[x]()]
        return run_in_order(names, lambda name: CHECKS[name](probe), subject)


def check_cached_layer(
    make_layer: Callable[[], CachedLayer],
    *,
    hidden_dim: int = 16,
    batch_size: int = 3,
    max_length: int = 24,
    dtype: DType = "float32",
    seed: int = 0,
    checks: Any = None,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Checks that a layer keeps the contract of `attention.CachedLayer`.

    The outputs of a layer without a cache are the reference for all else:

    - `cache`: caches are zeros, batch axis first; a call returns the structure,
      shapes and dtypes it got.
    - `state`: calls change neither the layer nor the cache given.
    - `rows`: rows don't affect each other; a reordered cache reorders outputs.
    - `causality`: a changed token moves no earlier output.
    - `prefill_and_steps`, `chunks`, `positions`: a prefill and single tokens,
      chunks of 1, 3, 7 and random sizes, and rows at different positions all
      equal one call over the whole sequence.
    - `masked_rows`: a query that may attend to nothing gives no NaN.
    - `padding`: padded tokens are no-ops, and their contents play no role.
    - `capacity`: unfilled slots play no role, `grow_cache` keeps the past, and
      padding that reaches past the end overwrites nothing.
    - `rewind`: where `can_rewind` is true, tokens that were taken back leave no
      trace, in rows that take back as many and in rows that don't.
    - `packing`: documents that share a row (`attention.SegmentScope`) have the outputs
      that each has alone, and one moves none of another's. Layers whose `call` has no
      `segment_ids` are left out: they can't be trained on packed rows.
    - `compiled`: XLA (TensorFlow) and jit (JAX) give what eager calls give.
    - `low_precision`: `mixed_bfloat16`, `bfloat16`, `mixed_float16` stay near.
    - `gradients`: finite, and the same with a cache and without.
    - `config`, `saving`: the layer comes back from `get_config` and `.keras`.

    The checks need no test framework. They set Keras's random seed, and add
    small noise to all trainable weights, so that what starts at zero counts.

    Args:
        make_layer: a function without arguments that makes a new layer. It is
            called several times, under different dtype policies.
        hidden_dim: int. The width of the inputs.
        batch_size: int. The number of rows, at least 2.
        max_length: int. The length of the sequences, at least 8. It should be
            larger than a window or a chunk that the layer has.
        dtype: the dtype policy under which layers are made.
        seed: int. Of weights, inputs and random chunk sizes.
        checks: names of the checks to run; `None` means all.
        tolerance: float or `None`. The difference that is allowed for outputs of
            size 1, for a layer that rounds more with a cache, such as to 8 bits.

    Returns:
        A dict from each check to the largest difference that was found. Checks that
        can't be made are not in it: on torch, which compiles nothing, `compiled`.

    Raises:
        ConformanceError: an `AssertionError` that names the first check that
            failed, the largest difference and where it is.
        TypeError: if `make_layer` makes no `CachedLayer`.
        ValueError: if another argument is out of range.

    Example:

    >>> from attention import RotaryAttention
    >>> from attention.testing import check_cached_layer
    >>> report = check_cached_layer(
    ...     lambda: RotaryAttention(num_heads=4, num_key_value_heads=2),
    ...     checks=["causality", "prefill_and_steps"],
    ... )
    >>> sorted(report), max(report.values()) < 1e-4
    (['causality', 'prefill_and_steps'], True)
    """
    subject = Subject(make_layer, batch_size, max_length, dtype, seed, hidden_dim)
    return run_checks(subject, checks, tolerance)


def check_cached_model(
    make_model: Callable[[], Any],
    *,
    inputs: Any = None,
    sources: dict[str, Any] | None = None,
    hidden_dim: int = 16,
    batch_size: int = 3,
    max_length: int = 24,
    dtype: DType = "float32",
    seed: int = 0,
    checks: Any = None,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Checks a block, a backbone or any Keras model made of cached layers.

    The checks are those of `check_cached_layer`. A model is run by
    `call_with_cache`. Besides the mistakes of a cached layer they find that of a
    model: an ordinary layer that mixes along the sequence (a convolution, an
    average) and so sees other tokens in decoding.

    Args:
        make_model: a function without arguments that makes a new
            `keras.Model`, or a cached layer such as a `blocks.CustomDecoder`.
        inputs: an example of the model's inputs, arrays of shape `(batch,
            length, ...)`: like it inputs are drawn. Needed for a subclassed
            model, and for integers of unknown range; otherwise read off the
            model. An input with "mask" in its name is a padding mask.
        sources: dict of arrays with one row, `(1, source_length, ...)`, by the names of
            inputs that are no parts of the sequence, such as `encoder_sequence` of a
            decoder: they are given whole at each call, and are the same for all rows.
        hidden_dim: int. The width of the inputs, for a cached layer.
        batch_size, max_length, dtype, seed, checks, tolerance: as for a layer.

    Returns:
        A dict from each check to the largest difference that was found.

    Raises:
        ConformanceError: as for `check_cached_layer`.
        TypeError: if `make_model` makes neither a model nor a cached layer.
        ValueError: if the inputs of the model are not known.

    Example:

    >>> import keras
    >>> from attention import MultiHeadAttention
    >>> from attention.testing import check_cached_model
    >>> def make_model():
    ...     attend = MultiHeadAttention(num_heads=2)
    ...     inputs = keras.Input((None, 8))
    ...     return keras.Model(inputs, attend(attend(inputs)))
    >>> report = check_cached_model(make_model, checks="chunks")
    >>> report["chunks"] < 1e-4
    True
    """
    for x in [] if inputs is None else tree.flatten(inputs):
        if len(getattr(x, "shape", ())) < 2 or isinstance(x, keras.KerasTensor):
            raise ValueError(
                "`inputs` must be an example of the model's inputs: arrays of shape "
                f"(batch, length, ...). Received: inputs={describe(inputs)}"
            )
    if callable(make_model) and isinstance(make_model(), CachedLayer):
        own: dict[str, Any] = {"hidden_dim": hidden_dim}
        kind: type[Subject] = Subject
    else:
        own = {"example": inputs, "sources": sources}
        kind = ModelSubject
    subject = kind(make_model, batch_size, max_length, dtype, seed, **own)
    return run_checks(subject, checks, tolerance)
