"""Type aliases for what layers take and return.

Keras is not typed, and each backend has a tensor class of its own, so to mypy most
of these are `Any`: they tell the reader of a signature what may be passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

# An array of the backend, a NumPy array, or a `keras.KerasTensor` while a model is
# made from symbolic inputs. Its shape is in the docstring.
Tensor: TypeAlias = Any

# A boolean tensor. A padding mask is of shape `(batch, length)`, true for real tokens.
Mask: TypeAlias = Tensor

# What `create_cache` returns, and a `call` with `cache=` returns updated: a tensor or
# a pytree of tensors (tuple, list, dict), each with the batch as its first axis.
Cache: TypeAlias = Any

# A `cache_update_index` or another position: an int or an integer scalar tensor for
# all rows, or an integer tensor of shape `(batch,)` with one for each row.
Index: TypeAlias = int | Tensor

# The shape of an array, with `None` for a size not known before it runs.
Shape: TypeAlias = tuple[int | None, ...]

# What Keras takes for a data type: a name, `None` for the default, or its object.
DType: TypeAlias = Any

# What `keras.initializers.get` takes: a name, a config, an initializer, a function.
Initializer: TypeAlias = Any

# What `keras.activations.get` takes: a name, a function, or `None` for none.
Activation: TypeAlias = str | Callable[[Tensor], Tensor] | None
