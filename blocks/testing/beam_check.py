"""The check of beam search, against beam search without a cache."""

from __future__ import annotations

import keras_hub
import numpy as np

from blocks.testing.generation_prompts import Rows
from blocks.testing.generation_session import Session


def check_beam(session: Session) -> None:
    """Beam search finds what it finds without a cache."""
    # Lengths between these add nothing but time: each may be compiled.
    lengths = [len(prompt) for prompt in session.prompts]
    ends = (min(lengths), max(lengths))
    rows = [row for row, length in enumerate(lengths) if length in ends]
    prompts = [session.prompts[row] for row in rows]
    session.compile(keras_hub.samplers.BeamSampler(num_beams=session.num_beams))
    found = session.generate(prompts)
    if any(len(row) != session.new_tokens for row in found):
        session.complain(
            f"Beam search must give each row {session.new_tokens} new tokens. The "
            f"rows got {[len(row) for row in found]}."
        )
    wanted = _brute_force_beams(session, prompts)
    scores = _total_scores(session, prompts, found)
    for row, prompt, new, score, (best, beams, margin) in zip(
        rows, prompts, found, scores, wanted
    ):
        gap, allowed = abs(best - score), session.tolerance * max(1.0, -best)
        if gap <= allowed:
            session.largest = max(session.largest, gap)
        # Beams that tie may be dropped in either order, and so lead elsewhere.
        elif not margin <= allowed:
            session.complain(
                "Beam search must find what beam search over the model without a "
                f"cache finds.\n  Row {row} (a prompt of {len(prompt)} tokens), "
                f"num_beams={session.num_beams}: the log probability of the new "
                f"tokens {new} is {score:.5g}, that of the best beam {beams[-1][0]} "
                f"is {best:.5g} (allowed difference: {allowed:.2g}).",
                _explain_beam(session, row, new, beams),
                gap,
            )


def _explain_beam(
    session: Session, row: int, found: list[int], beams: list[Rows]
) -> str:
    if found == session.alone[row]:
        return "This is the greedy continuation: was the sampler used at all?"
    steps = (i for i, kept in enumerate(beams) if found[: i + 1] not in kept)
    step = next(steps, session.new_tokens - 1)
    return (
        f"Its first {step} tokens are still a beam of the search without a cache. If "
        "`greedy` and `ragged_batch` hold, look at how beams keep their pasts apart: "
        "every tensor of every cache must have the batch as its first axis, as beams "
        "are repeated and reordered along it, and nothing of the past may be kept "
        "elsewhere."
    )


def _brute_force_beams(
    session: Session, prompts: Rows
) -> list[tuple[float, list[Rows], float]]:
    """Beam search over the model without a cache.

    Returns:
        For each prompt: the best beam's log probability, the beams after each
        step (of the last step only the best), and the smallest difference
        between a beam that was kept and one that was dropped.
    """
    kept: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in prompts]
    history: list[list[Rows]] = [[] for _ in prompts]
    margins = [np.inf for _ in prompts]
    for _ in range(session.new_tokens):
        prefixes = [
            prompt + new for prompt, beams in zip(prompts, kept) for _, new in beams
        ]
        scores = iter(_log_softmax(session.logits(prefixes)))
        for row, beams in enumerate(kept):
            totals = np.stack([total + next(scores) for total, _ in beams])
            order = np.argsort(-totals, axis=None)[: session.num_beams + 1]
            last, dropped = totals.ravel()[order[-2:]]
            margins[row] = min(margins[row], last - dropped)
            pairs = zip(*np.unravel_index(order[:-1], totals.shape))
            kept[row] = [
                (float(totals[beam, token]), [*beams[beam][1], int(token)])
                for beam, token in pairs
            ]
            history[row].append([new for _, new in kept[row]])
    return [
        (beams[0][0], [*steps[:-1], steps[-1][:1]], margin)
        for beams, steps, margin in zip(kept, history, margins)
    ]


def _total_scores(session: Session, prompts: Rows, new: Rows) -> list[float]:
    """Returns the log probability of the new tokens of each row, without a cache."""
    prefixes = [
        prompt + tokens[:step]
        for prompt, tokens in zip(prompts, new)
        for step in range(len(tokens))
    ]
    scores = iter(_log_softmax(session.logits(prefixes)))
    return [float(sum(next(scores)[token] for token in tokens)) for tokens in new]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
