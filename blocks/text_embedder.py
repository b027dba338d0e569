"""Embeddings of texts by any encoder backbone."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from attention.contract import check_positive_int, describe
from blocks.encoder_task import EncoderTask, check_pooling, pooled
from blocks.hugging_face_files import read_pooling, write_pooling

# Lengths are multiples of it, so that there are few to compile for.
_LENGTHS = 16


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class TextEmbedder(EncoderTask, keras_hub.models.TextEmbedder):
    """Makes a vector of each text, by any `blocks.CustomEncoderBackbone`.

    A folder that sentence-transformers wrote says which pooling, and whether vectors are
    normalized; `from_preset` reads it.

    Args:
        backbone: a `blocks.CustomEncoderBackbone`.
        preprocessor: a `keras_hub.models.TextClassifierPreprocessor`, or `None` for
            tokens.
        pooling: str. `"mean"`: the mean of all tokens, or `"cls"`: the first one.
        normalize: bool. Whether vectors have the length 1, so that a product of two is
            their cosine similarity.
        **kwargs: arguments of `keras_hub.models.TextEmbedder`.

    Call arguments:
        inputs: a dict of what the backbone takes.

    Returns:
        A `float32` tensor of shape `(batch, hidden_dim)`.

    Raises:
        TypeError: if `backbone` is no `blocks.CustomEncoderBackbone`.
        ValueError: if `pooling` is unknown.

    Example:

    >>> import numpy as np
    >>> from blocks import CustomEncoderBackbone, TextEmbedder
    >>> backbone = CustomEncoderBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
    >>> embedder = TextEmbedder(backbone)
    >>> tokens = np.array([[1, 7, 3, 9], [1, 4, 2, 0]])
    >>> x = {"token_ids": tokens, "padding_mask": (tokens > 0).astype("int32")}
    >>> vectors = embedder.predict(x, verbose=0)
    >>> bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3))
    True

    Reference:

    - [Reimers et al., 2019](https://arxiv.org/abs/1908.10084)
    """

    task = "backbone"

    def __init__(
        self,
        backbone: Any,
        preprocessor: Any = None,
        pooling: str = "mean",
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        self.set_parts(backbone, preprocessor, kwargs)
        self.pooling = check_pooling(pooling)
        self.normalize = bool(normalize)
        inputs = backbone.input
        x = pooled(backbone(inputs), inputs["padding_mask"], self.pooling)
        x = ops.cast(x, "float32")
        outputs = ops.normalize(x, axis=-1) if self.normalize else x
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def embed(self, texts: str | list[str], batch_size: int = 32) -> np.ndarray:
        """Returns the vectors of texts, which are padded to the longest of their batch.

        Args:
            texts: a string, or a list of strings.
            batch_size: int. How many texts are embedded at once.

        Returns:
            An array of shape `(hidden_dim,)`, or `(len(texts), hidden_dim)`.

        Raises:
            TypeError: if `texts` are no strings.
            ValueError: if there is no preprocessor.
        """
        if self.preprocessor is None:
            raise ValueError(
                "`embed` needs a preprocessor, which makes tokens of texts. Pass "
                "`preprocessor=` to the embedder, or tokens to `predict`."
            )
        if isinstance(texts, str):
            return self.embed([texts], 1)[0]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(
                "`texts` must be a string or a list of strings. Received: "
                f"texts={describe(texts)}"
            )
        size = check_positive_int("batch_size", batch_size)
        vectors = np.zeros((len(texts), self.output.shape[-1]), "float32")
        # Texts of about the same length together.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            x = self.preprocess_samples([texts[i] for i in rows])
            x = {name: np.asarray(ops.convert_to_numpy(v)) for name, v in x.items()}
            longest = int(x["padding_mask"].sum(axis=1).max())
            length = -(-max(longest, 1) // _LENGTHS) * _LENGTHS
            x = {name: value[:, :length] for name, value in x.items()}
            vectors[rows] = self.predict_on_batch(x)
        return vectors

    def export_to_transformers(self, path: str, dtype: str | None = None) -> None:
        """Writes a folder that transformers and sentence-transformers load.

        Arguments and errors are those of the other tasks.
        """
        super().export_to_transformers(path, dtype)
        length = getattr(self.preprocessor, "sequence_length", None)
        width = self.backbone.hidden_dim
        write_pooling(path, self.pooling, self.normalize, width, length)

    @classmethod
    def read_options(cls, folder: str) -> dict[str, Any]:
        return read_pooling(folder)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["pooling"] = self.pooling
        config["normalize"] = self.normalize
        return config
