"""Checks of generation, each against the same model called without a cache."""

from __future__ import annotations

from collections.abc import Callable

import keras_hub
import numpy as np
from keras import ops

from attention.contract import Tensor
from blocks.testing.generation_session import Choice, Rows, Session


def check_lengths(session: Session) -> None:
    """Each row gets as many tokens as were asked for, after its prompt."""
    session.compile("greedy")
    lengths = np.array([len(prompt) for prompt in session.prompts])
    total = session.longest + min(2, session.new_tokens)
    each = "how many tokens each row gets, whatever the length of its prompt"
    both = "the length of prompt and new tokens together"
    for name, value, expected, meaning in (
        ("max_new_tokens", session.new_tokens, 0 * lengths + session.new_tokens, each),
        ("max_new_tokens", 1, 0 * lengths + 1, each),
        ("max_length", total, total - lengths, both),
    ):
        new = session.generate(**{name: value})
        for row, (tokens, count) in enumerate(zip(new, expected)):
            if len(tokens) != count:
                session.complain(
                    f"`{name}={value}` is {meaning}, so without stop tokens row {row} "
                    f"(a prompt of {lengths[row]} tokens) must get {count} new tokens. "
                    f"It got {len(tokens)}; the rows got {[len(x) for x in new]}.",
                    "The first new token comes from the prefill and counts as one. "
                    "Each row ends by its own length, not by that of the longest "
                    "prompt.",
                    float(abs(len(tokens) - count)),
                )


def check_greedy(session: Session) -> None:
    """Each prompt alone continues as by the model without a cache."""

    def advice(wrong: list[Choice]) -> str:
        if wrong[0].step == 0:
            text = (
                "The first new token is wrong already. It comes from the prefill: "
                "look at whose position's logits are read (the prompt's last real "
                "token's), and at the prefill's padding and positions."
            )
        else:
            text = (
                "The first new token, from the prefill, is right; later ones come "
                "from decode steps. Either a cached layer's decode form differs from "
                "its full form: run `check_cached_model` on the backbone to find "
                "which; or the loop passes a wrong token, position or cache."
            )
        return text + _guess(
            session,
            wrong,
            [
                (lambda x: x.prefix[-1:], "the last token alone: the past is not read"),
                (
                    lambda x: x.prefix[:-1] or x.prefix,
                    "the prefix without its last token: it was not read",
                ),
                (
                    lambda x: x.prefix + x.prefix[-1:],
                    "the prefix with its last token twice: it was processed twice",
                ),
            ],
        )

    claim = (
        "The greedy continuation of a prompt, generated alone, must be the one that "
        "the model gives without a cache."
    )
    session.require(session.choices(session.alone), claim, advice)


def check_ragged_batch(session: Session) -> None:
    """Prompts of different lengths in one batch give what each gives alone."""

    def with_padding(choice: Choice) -> list[int]:
        prompt = session.prompts[choice.row]
        padding = [0] * (session.longest - len(prompt))
        return prompt + padding + choice.prefix[len(prompt) :]

    def advice(wrong: list[Choice]) -> str:
        text = "Rows disturb each other."
        if all(len(session.prompts[x.row]) < session.longest for x in wrong):
            text = (
                "Rows of different lengths disturb each other. Only rows that are "
                "shorter than the longest are wrong: look at what becomes of their "
                "padding (is it attended to, read into a state, written over?) and "
                "at their positions (do new tokens follow the row's own last token, "
                "or the longest row's?)."
            )
        cause = "the prompt with its padding read as tokens 0: it is not masked"
        return text + _guess(session, wrong, [(with_padding, cause)])

    claim = "Prompts of different lengths in one batch must give what each gives alone."
    choices = session.divergences(session.batch, session.alone)
    session.require(choices, claim, advice)
    _require_ends(session, session.batch, session.alone, choices, claim)


def check_stop_tokens(session: Session) -> None:
    """Each row ends with its own first stop token, and the others go on."""
    free = session.batch
    stops = _choose_stops(free)
    expected = [row[: _end(row, stops)] for row in free]
    session.compile("greedy")
    actual = session.generate(stops=stops)
    claim = (
        f"With `stop_token_ids={stops}` each row must be as it is without stop tokens, "
        "up to its first new stop token and with it."
    )
    choices = session.divergences(actual, expected)
    session.require(
        choices,
        claim,
        "A row's tokens changed, not only where it ends: look at what a finished row "
        "does to the others' caches and positions while they go on.",
    )
    _require_ends(session, actual, expected, choices, claim)


def _choose_stops(new: Rows) -> tuple[int, ...]:
    """Returns one or two tokens at which rows end at different steps."""

    def value(stops: tuple[int, ...]) -> tuple[int, int]:
        ends = [_end(row, stops) for row in new if _end(row, stops) < len(row)]
        return len(set(ends)), len(ends)

    stops: tuple[int, ...] = ()
    tokens = sorted({token for row in new for token in row})
    # How many stop tokens there are is a shape, so one is cheaper.
    while len(stops) < 2 and value(stops)[0] < 2:
        stops = max(((*stops, token) for token in tokens), key=value)
    return stops


def _end(row: list[int], stops: tuple[int, ...]) -> int:
    ends = (i + 1 for i, token in enumerate(row) if token in stops)
    return next(ends, len(row))


def _require_ends(
    session: Session, actual: Rows, expected: Rows, ties: list[Choice], claim: str
) -> None:
    """Fails if rows that are equal otherwise end elsewhere."""
    late = (
        "Each row needs its own flag of being done, set by each new token, the first one "
        "(from the prefill) too."
    )
    early = (
        "Did it end because another row did, or at a token of its prompt, or was its stop "
        "token taken away?"
    )
    tied = {choice.row for choice in ties}
    for row, (a, b) in enumerate(zip(actual, expected)):
        if len(a) != len(b) and row not in tied:
            session.complain(
                f"{claim}\n  Row {row} (a prompt of {len(session.prompts[row])} "
                f"tokens) has {len(a)} new tokens {a}, expected were {len(b)}: {b}.",
                late if len(a) > len(b) else early,
                float(abs(len(a) - len(b))),
            )


def check_weights(session: Session) -> None:
    """Generation follows the weights, also those assigned after it was compiled."""
    session.compile("greedy")
    before = session.generate()
    session.set_weights(draw=2)
    try:
        after = session.generate()
        stale = (
            "The tokens are exactly those of the earlier weights: a compiled function "
            "has them in it as constants. "
        )
        session.require(
            session.choices(after),
            "New weights were assigned after a first `generate`; the next one must be "
            "that of the model without a cache with the new weights.",
            f"{stale if after == before else ''}A compiled function must read the "
            "variables at each call (on JAX they are arguments of it), and nothing "
            "computed from weights may be kept from one call to the next.",
        )
    finally:
        session.set_weights()


def check_sampling(session: Session) -> None:
    """A seeded sampler gives likely tokens, and the same for the same seed."""
    k = min(5, session.vocabulary_size)

    def sample() -> Rows:
        session.compile(keras_hub.samplers.TopKSampler(k=k, seed=session.seed))
        return session.generate()

    first, again = sample(), sample()
    session.require(
        session.choices(first, rank=k - 1, at_least=True),
        f"`TopKSampler(k={k})` must choose one of the {k} likeliest tokens. (The "
        "expected token below is the last of these.)",
        "If `greedy` and `ragged_batch` hold, the sampler gets other logits than the "
        "model's, or is not the one the model was compiled with.",
    )
    for row, (tokens, others) in enumerate(zip(first, again)):
        if tokens != others:
            session.complain(
                f"Two fresh samplers with seed={session.seed} must give the same "
                f"tokens, but row {row} first got {tokens}, then {others}.",
                "Random numbers must come from the sampler's seed generator alone, "
                "as it is at the beginning of `generate`.",
            )


class SecondBest(keras_hub.samplers.Sampler):
    """A user's sampler: the second most probable token."""

    def get_next_token(self, probabilities: Tensor) -> Tensor:
        return ops.top_k(probabilities, k=2)[1][:, 1]


def check_own_sampler(session: Session) -> None:
    """A `Sampler` with only `get_next_token` decides on every token."""
    session.compile(SecondBest())
    new = session.generate()
    advice = (
        "If `greedy` and `ragged_batch` hold, look at where `get_next_token` is "
        "called: once for each new token, the first one too, on probabilities."
    )
    if new == session.batch:
        advice = "These are the tokens of greedy: the sampler was not used."
    claim = (
        "A sampler whose `get_next_token` chooses the second most probable token must "
        "get the second of the model without a cache."
    )
    session.require(session.choices(new, rank=1), claim, advice)


def _guess(
    session: Session, wrong: list[Choice], causes: list[tuple[Callable, str]]
) -> str:
    """Returns the cause that explains the first wrong token of every row."""
    firsts = list({choice.row: choice for choice in reversed(wrong)}.values())
    for variant, text in causes:
        logits = session.logits([variant(choice) for choice in firsts])
        explained = logits.argmax(axis=-1) == [choice.chosen for choice in firsts]
        # A single one may be chance.
        if len(firsts) > 1 and explained.all():
            return f"\n  The wrong tokens are those for {text}."
    return ""


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
    """Searches with the model without a cache.

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
