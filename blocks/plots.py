"""Pictures of a training and of attention, by `matplotlib`, imported to draw one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from attention.contract import ScoreScope, call_sites, describe
from blocks.checkpoints.packages import require
from blocks.generation.prompts import read_batches, read_prompts
from blocks.language_model import LanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_history(history: keras.callbacks.History | dict[str, list[float]]) -> Figure:
    """Draws the loss over the epochs, and below it a panel for each other metric.

    What was held out (`val_loss`) is in the panel of what was trained on (`loss`).

    Args:
        history: what `fit` returns, or its `history`: a dict from names to numbers, one
            for each epoch. Where there are fewer, such as with `validation_freq`, they
            are drawn at equal distances.

    Returns:
        A `matplotlib.figure.Figure`. A notebook shows it, `savefig` saves it; no window
        or display is needed.

    Raises:
        ImportError: if `matplotlib` is not installed.
        TypeError: if `history` is none.
        ValueError: if it holds no epoch.

    Example:

    >>> from blocks import plot_history
    >>> figure = plot_history({"loss": [3.1, 2.5], "val_loss": [3.0, 2.7]})
    >>> [line.get_label() for line in figure.axes[0].get_lines()]
    ['loss', 'val_loss']
    >>> figure.savefig("loss.png")  # doctest: +SKIP
    """
    values = getattr(history, "history", history)
    if not isinstance(values, dict):
        raise TypeError(
            "`history` must be the `keras.callbacks.History` that `fit` returns, or its "
            f"dict. Received: history={describe(history)}"
        )
    epochs = max(map(len, values.values()), default=0)
    if not epochs:
        raise ValueError("`history` holds no epoch: call `fit` first.")
    numbers = [1 + x for x in getattr(history, "epoch", range(epochs))]
    panels: dict[str, list[str]] = {"loss": []}
    for name in values:
        panels.setdefault(name.removeprefix("val_"), []).append(name)
    panels = {panel: sorted(names) for panel, names in panels.items() if names}
    figure = _new_figure(6.4, 1.4 + 1.6 * len(panels))
    heights = [2.0] + [1.0] * (len(panels) - 1)
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    for ax, (panel, names) in zip(axes, panels.items()):
        for name in names:
            count = len(values[name])
            step = epochs // count
            places = numbers[step - 1 :: step][:count]
            ax.plot(places, values[name], marker=".", label=name)
        ax.set_ylabel(panel)
        ax.grid(alpha=0.3)
        if len(names) > 1:
            ax.legend()
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def attention_scores(lm: LanguageModel, text: Any) -> dict[str, np.ndarray]:
    """Returns how much each token of a text attends to each other.

    The model is called once, without a cache, and is the same after it. Any attention
    that has weights gives them, wherever it is in the model; `attention.ScoreScope` does
    this for other models.

    Args:
        lm: a `blocks.CausalLM` or a `blocks.Seq2SeqLM`.
        text: a string, or the token ids of one row, as for `generate`; of an
            encoder-decoder model its source, or a dict of source and target.

    Returns:
        A dict from the path of each attention layer, in the order of the calls, to a
        `float32` array of shape `(1, heads, queries, keys)`. Each query's weights sum to
        1, except with attention sinks and in `DifferentialAttention`. A second call of
        a layer has its number behind the path.

    Raises:
        TypeError: if `lm` is no language model of `blocks`, or `text` neither text nor tokens.
        ValueError: if it is several texts, or no layer has weights.

    Example:

    >>> from blocks import CausalLM, CustomBackbone, attention_scores
    >>> lm = CausalLM(CustomBackbone(50, 2, 4, 16, 32))
    >>> scores = attention_scores(lm, [3, 1, 4])
    >>> {name: x.shape for name, x in scores.items()}
    {'transformer_layer_0/self_attention': (1, 4, 3, 3),
     'transformer_layer_1/self_attention': (1, 4, 3, 3)}
    """
    return _scores_of(lm, _read_one(lm, text))


def attention_maps(
    lm: LanguageModel,
    text: Any,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Figure:
    """Draws how much each token of a text attends to each other.

    Each row of the picture is a layer and each column a head. In a map, a row is a token
    that attends, and a column one that it attends to; all have one scale of colors.

    Args:
        lm: a `blocks.CausalLM` or a `blocks.Seq2SeqLM`.
        text: a string, or the token ids of one row, as for `generate`; of an
            encoder-decoder model its source, or a dict of source and target.
        layers: which of the layers that `attention_scores` returns; `None`: all.
        heads: which heads; `None` means all.

    Returns:
        A `matplotlib.figure.Figure`, as from `plot_history`.

    Raises:
        ImportError: if `matplotlib` is not installed.
        TypeError: as `attention_scores`.
        ValueError: as `attention_scores`, or if there is no such layer or head.

    Example:

    >>> from blocks import CausalLM, CustomBackbone, attention_maps
    >>> lm = CausalLM(CustomBackbone(50, 2, 4, 16, 32))
    >>> figure = attention_maps(lm, [3, 1, 4], layers=[-1], heads=[0, 1])
    >>> [ax.get_title() for ax in figure.axes[:2]]
    ['head 0', 'head 1']
    """
    inputs = _read_one(lm, text)
    names, arrays = zip(*_scores_of(lm, inputs).items())
    rows = _choose("layers", layers, len(names))
    columns = _choose("heads", heads, max(x.shape[1] for x in arrays))
    longest = max(max(arrays[row].shape[2:]) for row in rows)
    side = min(max(0.16 * longest, 1.6), 4.0)
    size = (1.4 + side * len(columns), 0.8 + (side + 0.4) * len(rows))
    figure = _new_figure(*size)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    limits = {
        "vmin": min(0.0, *(float(arrays[row].min()) for row in rows)),
        "vmax": max(float(arrays[row].max()) for row in rows),
    }
    for row, row_axes in zip(rows, axes):
        queries, keys = _sequences(lm, inputs, names[row])
        for i, (head, ax) in enumerate(zip(columns, row_axes)):
            if head >= arrays[row].shape[1]:
                ax.set_axis_off()
                continue
            scores = arrays[row][0, head]
            image = ax.imshow(scores, cmap="viridis", aspect="auto", **limits)
            ax.set_title(f"head {head}", fontsize=8)
            if not i:
                ax.set_ylabel(names[row], fontsize=7)
            # Sources may be no tokens.
            if scores.shape[1] == len(keys):
                _label(ax.xaxis, keys, rotation=90)
            _label(ax.yaxis, [] if i or scores.shape[0] != len(queries) else queries)
    figure.colorbar(image, ax=axes, fraction=0.03, aspect=40, label="weight")
    return figure


def _read_one(lm: Any, text: Any) -> dict[str, np.ndarray]:
    """Returns the inputs of a model for one text."""
    if not isinstance(lm, LanguageModel):
        raise TypeError(
            "`lm` must be a `blocks.CausalLM` or a `blocks.Seq2SeqLM`. Received: "
            f"{describe(lm)}"
        )
    batches, _ = read_batches(text, lm.split_inputs)
    # Where there is a longest sequence, the model says so itself.
    prompts = read_prompts(batches[0], lm, None, 1, None)
    tokens = prompts.token_ids
    if len(batches) > 1 or len(tokens) > 1:
        raise ValueError(
            "`text` must be one string, or the token ids of one row. Received: "
            f"text={describe(text)}"
        )
    targets = zip(lm.target_names, (tokens, np.ones_like(tokens)))
    return {**(prompts.sources or {}), **dict(targets)}


def _scores_of(lm: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with ScoreScope() as found:
        lm.compute_hidden_states(inputs, training=False)
    arrays: dict[str, np.ndarray] = {}
    calls: dict[str, int] = {}
    for layer, scores in found:
        count = calls[layer.path] = calls.get(layer.path, 0) + 1
        name = layer.path if count == 1 else f"{layer.path} {count}"
        arrays[name] = ops.convert_to_numpy(scores)
    if not arrays:
        inner = [x for site in call_sites(lm.decoder) for x in _parts(site)]
        kinds = sorted({type(x).__name__ for x in inner})
        raise ValueError(
            "No layer of the model has weights of attention, as recurrent mixers have "
            f"none. Its layers that mix tokens are {', '.join(kinds) or 'none'}."
        )
    return arrays


def _sequences(lm: Any, inputs: dict[str, np.ndarray], name: str) -> list[list[str]]:
    """Returns the tokens that attend in a layer, and those that are attended to."""
    targets = _labels(inputs[lm.target_names[0]], lm.preprocessor)
    source = inputs.get("encoder_token_ids")
    sources = [] if source is None else _labels(source, lm.preprocessor)
    if name.startswith("encoder"):
        return [sources, sources]
    return [targets, sources if "cross_attention" in name else targets]


def _parts(site: Any) -> Sequence[Any]:
    return site.inner_layers() or (site,)


def _choose(name: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    """Returns the chosen ones of so many, counted from 0."""
    if chosen is None:
        return list(range(count))
    if not chosen or not all(-count <= x < count for x in chosen):
        raise ValueError(
            f"`{name}` must be a list of numbers from 0 to {count - 1}, as there are "
            f"{count}. Received: {name}={chosen}"
        )
    return [x % count for x in chosen]


def _labels(tokens: np.ndarray, preprocessor: Any) -> list[str]:
    """Returns how tokens are written, or their ids where there is no tokenizer."""
    ids = [int(x) for x in tokens[0]]
    if preprocessor is None:
        return [str(x) for x in ids]
    written = [str(preprocessor.tokenizer.id_to_token(x)) for x in ids]
    return [repr(x)[1:-1].replace(" ", "\N{OPEN BOX}") for x in written]


def _label(axis: Any, labels: list[str], **options: Any) -> None:
    # As many as there is room for.
    step = len(labels) // 32 + 1
    ticks = range(0, len(labels), step)
    axis.set_ticks(ticks, labels[::step], fontsize=6, parse_math=False, **options)


def _new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure that no global state of `pyplot` knows."""
    base = require("matplotlib.figure", "Pictures", extra="plots").Figure
    # Notebooks show others only where `pyplot` was imported.
    shown = type("Picture", (base,), {"_repr_png_": _to_png})
    return shown(figsize=(width, height), layout="constrained")


def _to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
