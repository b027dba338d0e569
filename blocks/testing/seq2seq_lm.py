"""The check of encoder-decoder language models that users run on their own."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import check_positive_int, describe
from attention.testing.backends import full_precision, to_numpy
from attention.testing.running import run_in_order, select
from blocks.testing.causal_lm import CHECKS as OF_TARGETS
from blocks.testing.generation_session import Session, max_length

_TOLERANCE = 1e-4


class _PairsSession(Session):
    """A model whose rows begin with the number of their source."""

    made: _Pairs


class _Pairs(keras.Model):
    """An encoder-decoder model as one of rows of tokens.

    The first token of a row is the number of its source; the others are the target.
    """

    def __init__(self, lm: Any, sources: dict[str, np.ndarray]) -> None:
        super().__init__(name=lm.name)
        self.lm, self.sources = lm, sources
        # What it is made of is, which JAX asks for.
        self.built = True
        # The limit is that of targets.
        limit = max_length(getattr(lm.backbone, "decoder", lm.backbone))
        self.backbone = types.SimpleNamespace(max_sequence_length=limit and limit + 1)

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        tokens, mask = inputs["token_ids"], inputs["padding_mask"]
        numbers = ops.clip(tokens[:, 0], 0, len(next(iter(self.sources.values()))) - 1)
        given = {
            name: ops.take(ops.convert_to_tensor(x), numbers, axis=0)
            for name, x in self.sources.items()
        }
        # There may be no target, of which the vocabulary is asked.
        start = min(1, tokens.shape[1] - 1)
        given["decoder_token_ids"] = tokens[:, start:]
        given["decoder_padding_mask"] = mask[:, start:]
        logits = self.lm(given, training=training)
        return ops.concatenate([ops.zeros_like(logits[:, :start]), logits], axis=1)

    def compile(self, sampler: Any) -> None:  # type: ignore[override]
        self.lm.compile(sampler=sampler)

    def generate(self, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        tokens, mask = (np.asarray(inputs[x]) for x in ("token_ids", "padding_mask"))
        given = self.rows(tokens[:, 0])
        given["decoder_token_ids"] = tokens[:, 1:]
        given["decoder_padding_mask"] = mask[:, 1:]
        if options.get("max_length"):
            options["max_length"] -= 1
        found = self.lm.generate(given, **options)
        if not isinstance(found, dict):
            return found
        pairs = zip(("token_ids", "padding_mask"), (tokens, mask))
        return {
            name: np.concatenate([first[:, :1], found[f"decoder_{name}"]], axis=1)
            for name, first in pairs
            if f"decoder_{name}" in found
        }

    def rows(self, numbers: Any) -> dict[str, Any]:
        """Returns sources without the padding that all of them have."""
        given = {name: x[numbers] for name, x in self.sources.items()}
        masks = [x for name, x in given.items() if name.endswith("padding_mask")]
        if len({x.shape[1] for x in given.values()}) > 1 or not masks:
            return given
        longest = int(np.max([x.astype(bool).sum(axis=1).max() for x in masks]))
        return {name: x[:, :longest] for name, x in given.items()}


def _check_source(session: _PairsSession) -> None:
    """A target depends on its source, on all of it, and on nothing that is masked."""
    logits = _all_logits(session, session.made.sources)
    number = int(session.prompts[0][0])
    for name, x in session.made.sources.items():
        if not name.endswith("padding_mask"):
            changed = {**session.made.sources, name: np.roll(x, 1, axis=0)}
            masks = [m for m in changed if m.endswith("padding_mask")]
            changed |= {m: np.roll(changed[m], 1, axis=0) for m in masks}
            if _gap(_all_logits(session, changed), logits) < _TOLERANCE:
                session.complain(
                    f"With other rows of `{name}` the logits are the same: the decoder "
                    "does not attend to its source.",
                    "Look at whether blocks of the decoder have a cross-attention layer, "
                    "and are given what the encoder returns.",
                )
    hidden = _with_other_padding(session)
    _require_same(
        session,
        _all_logits(session, hidden),
        logits,
        "What the mask of a source hides must not count. Other values behind sources "
        "changed the logits.",
        "Look at whether the mask reaches the encoder's layers and the cross-attention "
        "(`encoder_padding_mask`).",
    )
    alone = session.made.rows([number])
    targets = _targets(session)
    row = {name: x[:1] for name, x in targets.items()}
    found = to_numpy(session.made.lm({**alone, **row}, training=False))
    _require_same(
        session,
        found,
        logits[:1],
        "A source without padding must give what it gives padded.",
        "Look at whether something counts positions from the end, or the length of the "
        "padded source.",
    )


def _check_causality(session: _PairsSession) -> None:
    """A target's token sees no later one."""
    logits = _all_logits(session, session.made.sources)
    targets = _targets(session)
    tokens = targets["decoder_token_ids"]
    place = tokens.shape[1] // 2
    changed = tokens.copy()
    changed[:, place:] = (changed[:, place:] + 1) % session.vocabulary_size
    found = _all_logits(session, session.made.sources, changed)
    _require_same(
        session,
        found[:, :place],
        logits[:, :place],
        f"Other tokens from position {place} of the targets on changed the logits before "
        "it.",
        "The self-attention of the decoder must be causal; that of the encoder must not.",
    )


def _check_encoder_once(session: _PairsSession) -> None:
    """The encoder runs once for a batch, however many tokens it gets."""
    lm = session.made.lm
    encoder = getattr(lm, "encoder", None)
    if encoder is None:
        session.complain("The model has no `encoder`, as a `blocks.Seq2SeqLM` has.")
    counts = []
    call = encoder.call

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        return call(*args, **kwargs)

    lm.compile(sampler="greedy", run_eagerly=True)
    encoder.call = counted
    try:
        session.doing = "asked to `generate`, not compiled"
        session.made.generate(
            {
                "token_ids": np.array([row[:2] for row in session.prompts]),
                "padding_mask": np.ones((len(session.prompts), 2), "int32"),
            },
            stop_token_ids=None,
            max_new_tokens=session.new_tokens,
        )
    finally:
        encoder.call = call
        session.compile("greedy")
    if len(counts) != 1:
        session.complain(
            f"The encoder must run once for a batch. It ran {len(counts)} times for "
            f"{session.new_tokens} new tokens.",
            "Run it before the loop: its keys and values are in the cache of the "
            "cross-attention.",
            float(len(counts)),
        )


CHECKS: dict[str, Callable[[Any], None]] = {
    "source": _check_source,
    "causality": _check_causality,
    "encoder_once": _check_encoder_once,
    **OF_TARGETS,
}


def check_seq2seq_lm(
    make_lm: Callable[[], Any],
    *,
    sources: dict[str, Any] | None = None,
    max_new_tokens: int = 8,
    num_beams: int = 3,
    seed: int = 0,
    checks: Any = None,
) -> dict[str, float]:
    """Checks that an encoder-decoder language model generates what it computes.

    Beside the checks of `check_causal_lm`, on targets of different lengths with sources
    of different lengths, it checks that

    - `source`: the logits depend on the source, on nothing that its mask hides, and not
      on how far it is padded;
    - `causality`: no token of a target sees a later one;
    - `encoder_once`: the encoder runs once for a batch.

    Args:
        make_lm: a function without arguments that makes a new `blocks.Seq2SeqLM`.
        sources: dict of arrays with four rows, by the names of the encoder's inputs; the
            default is tokens. Masks are those whose names end with `padding_mask`.
        max_new_tokens: int. How many tokens each target is continued by.
        num_beams: int. For beam search.
        seed: int. Of weights, targets, sources and samplers.
        checks: names of the checks to run; `None` means all.

    Returns:
        A dict from each check to the largest difference that was found.

    Raises:
        ConformanceError: an `AssertionError` that names the first check that
            failed, the largest difference and where it is. In it, the first token of a
            row is the number of its source.
        TypeError: if `make_lm` makes no such model.
        ValueError: if an argument is out of range.

    Example:

    >>> from blocks.testing import check_seq2seq_lm
    >>> from blocks import CustomSeq2SeqBackbone, Seq2SeqLM
    >>> report = check_seq2seq_lm(
    ...     lambda: Seq2SeqLM(
    ...         CustomSeq2SeqBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
    ...     ),
    ...     checks=["source", "causality", "greedy"],
    ... )
    >>> sorted(report), max(report.values()) < 1e-3
    (['causality', 'greedy', 'source'], True)
    """
    names = select(checks, CHECKS)
    check_positive_int("max_new_tokens", max_new_tokens)
    if not callable(make_lm) or isinstance(make_lm, keras.layers.Layer):
        raise TypeError(
            "`make_lm` must be a function without arguments that makes a new model, "
            f"such as `lambda: Seq2SeqLM(backbone)`. Received: {describe(make_lm)}"
        )
    with full_precision():
        keras.utils.set_random_seed(seed)
        lm = make_lm()
        if not isinstance(lm, keras.Model) or not hasattr(lm, "generate"):
            raise TypeError(
                "`make_lm` must return an encoder-decoder language model, such as a "
                f"`blocks.Seq2SeqLM`. It returned {describe(lm)}."
            )
        rng = np.random.default_rng(seed)
        size = int(lm.output.shape[-1])
        if sources is None:
            sources = _random_sources(rng, lm, size)
        made = _Pairs(lm, {name: np.asarray(x) for name, x in sources.items()})
        rows = len(next(iter(sources.values())))
        prompts = _random_targets(rng, made, rows, size, max_new_tokens)
        session = _PairsSession(made, prompts, max_new_tokens, num_beams, seed)
        return run_in_order(names, lambda name: CHECKS[name](session), session)


def _random_sources(rng: Any, lm: Any, size: int) -> dict[str, np.ndarray]:
    known = getattr(lm.backbone, "source_vocabulary_size", None) or size
    limit = getattr(lm.backbone, "max_source_length", None)
    limit = limit or getattr(lm.backbone, "max_sequence_length", None) or 12
    lengths = np.minimum([7, 12, 1, 5], limit)
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = rng.integers(1, known, mask.shape)
    return {
        "encoder_token_ids": np.where(mask, tokens, 0).astype("int32"),
        "encoder_padding_mask": mask.astype("int32"),
    }


def _random_targets(
    rng: Any, made: _Pairs, rows: int, size: int, new_tokens: int
) -> Iterable[list[int]]:
    room = made.backbone.max_sequence_length
    room = 99 if room is None else room - 1 - new_tokens
    lengths = np.clip([5, 9, 1, 9], 1, max(room, 1)).tolist()
    return [
        [row, *rng.integers(1, size, lengths[row % 4]).tolist()] for row in range(rows)
    ]


def _targets(session: _PairsSession) -> dict[str, np.ndarray]:
    """Returns targets of equal lengths, for each source one."""
    rows = [int(row[0]) for row in session.prompts]
    length = max(4, session.longest - 1)
    rng = np.random.default_rng(session.seed)
    tokens = rng.integers(1, session.vocabulary_size, (len(rows), length))
    return {
        "decoder_token_ids": tokens.astype("int32"),
        "decoder_padding_mask": np.ones_like(tokens, "int32"),
    }


def _all_logits(session: _PairsSession, sources: Any, tokens: Any = None) -> np.ndarray:
    targets = _targets(session)
    if tokens is not None:
        targets["decoder_token_ids"] = tokens
    session.doing = "called on sources and targets, without a cache"
    return to_numpy(session.made.lm({**sources, **targets}, training=False))


def _with_other_padding(session: _PairsSession) -> dict[str, np.ndarray]:
    """Returns the sources with other values where their masks hide them."""
    sources = session.made.sources
    masks = [x for name, x in sources.items() if name.endswith("padding_mask")]
    changed = {}
    for name, x in sources.items():
        mask = next((m for m in masks if m.shape == x.shape[:2]), None)
        if mask is None or name.endswith("padding_mask"):
            changed[name] = x
            continue
        real = mask.astype(bool).reshape(*mask.shape, *[1] * (x.ndim - 2))
        changed[name] = np.where(real, x, np.ones_like(x))
    return changed


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype("float64") - b).max())


def _require_same(
    session: _PairsSession, found: Any, expected: Any, claim: str, advice: str
) -> None:
    gap = _gap(found, expected)
    allowed = session.tolerance * max(1.0, float(np.abs(expected).max()))
    if not gap <= allowed:
        session.complain(
            f"{claim} Largest difference: {gap:.3g} (allowed: {allowed:.2g}).",
            advice,
            gap,
        )
    session.largest = max(session.largest, gap)
