"""An embedding that is narrower than the model."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import Shape, Tensor, declare_axes


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class ProjectedEmbedding(keras.layers.ReversibleEmbedding):
    """An embedding of another width than the model's, and projections in between.

    Args:
        *args: those of `keras.layers.ReversibleEmbedding`, also by keyword.
        hidden_dim: int. The width of the model.

    Call arguments:
        inputs: integer tensor of token ids, of any shape; with `reverse`, hidden states
            of shape `(..., hidden_dim)`.
        reverse: bool. Whether to return logits.

    Returns:
        A tensor of shape `(..., hidden_dim)`; with `reverse`, `(..., input_dim)`.

    Example:

    >>> import numpy as np
    >>> from blocks.layers.projected_embedding import ProjectedEmbedding
    >>> layer = ProjectedEmbedding(input_dim=50, output_dim=4, hidden_dim=16)
    >>> embedded = layer(np.array([[3, 1, 4]]))
    >>> embedded.shape == (1, 3, 16) and layer(embedded, reverse=True).shape == (1, 3, 50)
    True

    Reference:

    - [Zhang et al., 2022](https://arxiv.org/abs/2205.01068) (its model of 350M)
    """

    def __init__(self, *args: Any, hidden_dim: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_dim = hidden_dim
        options = {"use_bias": False, "dtype": self.dtype_policy}
        self.project_in = keras.layers.Dense(hidden_dim, name="project_in", **options)
        declare_axes(self.project_in, {"kernel": (None, None)})
        self.project_out = keras.layers.Dense(
            self.output_dim, name="project_out", **options
        )
        declare_axes(self.project_out, {"kernel": (None, None)})

    def build(self, inputs_shape: Shape | None = None) -> None:
        super().build(inputs_shape)
        self.project_in.build((None, self.output_dim))
        self.project_out.build((None, self.hidden_dim))

    def call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        if reverse:
            return super().call(self.project_out(inputs), reverse=True)
        return self.project_in(super().call(inputs))

    def compute_output_spec(self, inputs: Any, reverse: bool = False) -> Any:
        if reverse:
            return super().compute_output_spec(self.project_out(inputs), reverse=True)
        return self.project_in(super().compute_output_spec(inputs))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "hidden_dim": self.hidden_dim}
