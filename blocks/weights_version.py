"""A count of the changes of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class WeightsVersion:
    """Counts in `weights_version` how many times a model's weights were changed.

    Results kept of a model, such as a session's KV cache, are valid while this number
    stays the same. Training and loading raise it; assigning to single variables does
    not, as it does not look at the weights.
    """

    weights_version = 0

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the model, as `keras.Model.fit`."""
        with self._changing_weights():
            return super().fit(*args, **kwargs)  # type: ignore[misc]

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the model on one batch, as `keras.Model.train_on_batch`."""
        with self._changing_weights():
            return super().train_on_batch(*args, **kwargs)  # type: ignore[misc]

    def set_weights(self, weights: Any) -> None:
        """Sets the weights, as `keras.Model.set_weights`."""
        with self._changing_weights():
            super().set_weights(weights)  # type: ignore[misc]

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        """Loads the weights, as `keras.Model.load_weights`."""
        with self._changing_weights():
            super().load_weights(*args, **kwargs)  # type: ignore[misc]

    def load_lora_weights(self, filepath: Any) -> None:
        """Loads LoRA weights, as `keras_hub.models.Backbone.load_lora_weights`."""
        with self._changing_weights():
            super().load_lora_weights(filepath)  # type: ignore[misc]

    @contextlib.contextmanager
    def _changing_weights(self) -> Iterator[None]:
        # Raised before and after, as a callback of `fit` may generate in between.
        self.weights_version += 1
        try:
            yield
        finally:
            self.weights_version += 1
