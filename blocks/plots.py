"""Pictures of a training, by `matplotlib`, which is imported when one is drawn."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import keras

from attention.contract import describe
from blocks.checkpoints.packages import require

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
            step = epochs // len(values[name])
            ax.plot(numbers[step - 1 :: step], values[name], marker=".", label=name)
        ax.set_ylabel(panel)
        ax.grid(alpha=0.3)
        if len(names) > 1:
            ax.legend()
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


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
