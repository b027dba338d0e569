"""Classifiers of texts and of their tokens, on any encoder backbone."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
from keras import ops

from attention.contract import (
    Activation,
    Tensor,
    check_fraction,
    check_positive_int,
    declare_axes,
)
from blocks.encoder_task import EncoderTask, check_pooling, pooled

# The label of tokens that have none, as in transformers.
NO_LABEL = -100


class Classifier(EncoderTask):
    """What both classifiers share: the head's last layers, and the configuration."""

    num_classes: int = 0

    def set_head(
        self,
        num_classes: int,
        activation: Activation | None,
        dropout: float,
    ) -> None:
        """Sets the arguments and layers of the head."""
        self.num_classes = check_positive_int("num_classes", num_classes)
        self.activation = keras.activations.get(activation)
        self.dropout = check_fraction("dropout", dropout)
        options = {"dtype": self.backbone.dtype_policy}
        self.head_transform = self.make_transform()
        self.output_dropout = keras.layers.Dropout(
            dropout, name="classifier_dropout", **options
        )
        self.output_dense = keras.layers.Dense(
            num_classes,
            activation=activation,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="classifier",
            **options,
        )
        declare_axes(self.output_dense, {"kernel": (None, None)})

    def classify(self, x: Tensor) -> Tensor:
        """Returns the outputs of the head."""
        return self.output_dense(self.output_dropout(self.head_transform(x)))

    def published_config(self) -> dict[str, Any]:
        numbers = range(self.num_classes)
        return {
            "id2label": {str(i): f"LABEL_{i}" for i in numbers},
            "label2id": {f"LABEL_{i}": i for i in numbers},
        }

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        config["num_classes"] = self.num_classes
        config["activation"] = keras.activations.serialize(self.activation)
        config["dropout"] = self.dropout
        return config


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class TextClassifier(Classifier, keras_hub.models.TextClassifier):
    """A classifier of texts, or of pairs of them, on any `blocks.CustomEncoderBackbone`.

    ```
    backbone ─► pooling ─► create_head_transform ─► dropout ─► classifier
    ```

    Args:
        backbone: a `blocks.CustomEncoderBackbone`, whose `create_head_transform` makes
            the head's first layer.
        num_classes: int. The number of classes.
        preprocessor: a `keras_hub.models.TextClassifierPreprocessor`, or `None` for
            tokens.
        activation: the activation of the outputs; `None`: they are logits.
        dropout: float. The dropout rate before the last layer.
        pooling: `"cls"`, the first token, `"mean"`, the mean of all, or `None`: what the
            backbone was published with, which is `"cls"` for most.
        **kwargs: arguments of `keras_hub.models.TextClassifier`.

    Call arguments:
        inputs: a dict of what the backbone takes.

    Returns:
        A tensor of shape `(batch, num_classes)`.

    Raises:
        TypeError: if `backbone` is no `blocks.CustomEncoderBackbone`.
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> from blocks import CustomEncoderBackbone, TextClassifier
    >>> backbone = CustomEncoderBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
    >>> classifier = TextClassifier(backbone, num_classes=3)
    >>> tokens = np.array([[1, 7, 3, 9], [1, 4, 4, 2]])
    >>> x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    >>> _ = classifier.fit(x, np.array([0, 2]), verbose=0)
    >>> classifier.predict(x, verbose=0).shape
    (2, 3)

    Reference:

    - [Devlin et al., 2018](https://arxiv.org/abs/1810.04805)
    """

    task = "text_classifier"

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        preprocessor: Any = None,
        activation: Activation | None = None,
        dropout: float = 0.1,
        pooling: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.set_parts(backbone, preprocessor, kwargs)
        self.set_head(num_classes, activation, dropout)
        published = getattr(backbone, "classifier_pooling", "cls")
        self.pooling = check_pooling(published if pooling is None else pooling)
        inputs = backbone.input
        x = pooled(backbone(inputs), inputs["padding_mask"], self.pooling)
        super().__init__(inputs=inputs, outputs=self.classify(x), **kwargs)

    def export_to_transformers(self, path: str, dtype: str | None = None) -> None:
        published = getattr(self.backbone, "classifier_pooling", "cls")
        if self.pooling != published:
            raise ValueError(
                f"transformers classifies by pooling='{published}' what this backbone "
                f"computes, and this model by '{self.pooling}'. Nothing was written."
            )
        super().export_to_transformers(path, dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pooling": self.pooling}


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class LabeledTokenAccuracy(keras.metrics.SparseCategoricalAccuracy):
    """The accuracy of the tokens that have a label: one that is not -100."""

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> Any:
        labeled = ops.cast(ops.not_equal(y_true, NO_LABEL), "float32")
        if sample_weight is not None:
            labeled = labeled * ops.cast(sample_weight, "float32")
        return super().update_state(ops.maximum(y_true, 0), y_pred, labeled)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class TokenClassifier(Classifier, keras_hub.models.TextClassifier):
    """A classifier of each token, on any `blocks.CustomEncoderBackbone`.

    It learns from tokens and a label for each, which is -100 where there is none: of
    padding and special tokens, and of all but the first token of a word. With a
    preprocessor `predict` takes texts.

    Args:
        backbone: a `blocks.CustomEncoderBackbone`, whose `create_head_transform` makes
            the head's first layer, if it has one.
        num_classes: int. The number of classes.
        preprocessor: a `keras_hub.models.TextClassifierPreprocessor`, or `None` for
            tokens.
        activation: the activation of the outputs; `None`: they are logits.
        dropout: float. The dropout rate before the last layer.
        **kwargs: arguments of `keras_hub.models.TextClassifier`.

    Call arguments:
        inputs: a dict of what the backbone takes.

    Returns:
        A tensor of shape `(batch, length, num_classes)`.

    Raises:
        TypeError: if `backbone` is no `blocks.CustomEncoderBackbone`.
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> from blocks import CustomEncoderBackbone, TokenClassifier
    >>> backbone = CustomEncoderBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
    >>> classifier = TokenClassifier(backbone, num_classes=3)
    >>> tokens = np.array([[1, 7, 3, 9], [1, 4, 2, 0]])
    >>> labels = np.array([[-100, 0, 2, -100], [-100, 1, -100, -100]])
    >>> x = {"token_ids": tokens, "padding_mask": (tokens > 0).astype("int32")}
    >>> _ = classifier.fit(x, labels, verbose=0)
    >>> classifier.predict(x, verbose=0).shape
    (2, 4, 3)

    Reference:

    - [Devlin et al., 2018](https://arxiv.org/abs/1810.04805)
    """

    task = "token_classifier"

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        preprocessor: Any = None,
        activation: Activation | None = None,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.set_parts(backbone, preprocessor, kwargs)
        self.set_head(num_classes, activation, dropout)
        inputs = backbone.input
        outputs = self.classify(backbone(inputs))
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        """Configures training, as KerasHub's, with a loss and a metric of labels only."""
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=self.activation is not keras.activations.softmax,
                ignore_class=NO_LABEL,
            )
        if metrics == "auto":
            metrics = [LabeledTokenAccuracy("accuracy")]
        super().compile(optimizer, loss, metrics=metrics, **kwargs)
