"""The sizes that generation is compiled for."""

from __future__ import annotations

import dataclasses

from attention.contract import check_positive_int


@dataclasses.dataclass(frozen=True)
class GenerationSizes:
    """How much generation does at once, and which sizes it compiles for.

    Each size of a batch, a cache or a chunk is compiled, so there are few. They
    decide how fast generation is and how often it recompiles, never what comes out.
    The defaults were measured; see `benchmarks/README.md`.

    Example:

    >>> from blocks import GenerationSizes
    >>> sizes = GenerationSizes()
    >>> [sizes.round_up_capacity(n) for n in (1, 129, 513, 769, 1025)]
    [144, 144, 576, 864, 1152]
    >>> sizes.chunk_length(batch_size=1, capacity=1152)
    256
    """

    block_steps: int = 32
    """The most decode steps of one compiled call. Between two calls the host sees the
    new tokens, stops if all rows are done, and grows the KV cache if it is full."""

    min_capacity: int = 144
    """The smallest KV cache, in positions. It is doubled and doubled again, then there
    are two sizes to an octave, so that little is attended that is not filled. An eighth
    more than a power of two, as that is what prompts are often cut to."""

    min_chunk: int = 32
    """The fewest tokens of each row that a prefill processes at once. A chunk is a
    power of two times this, of about a fourth of the capacity, so that little is
    computed for padding."""

    max_chunk: int = 512
    """The most tokens of each row that are processed at once. More make products no
    faster, but attend to more keys that the causal mask hides."""

    max_chunk_tokens: int = 1024
    """The most tokens of all rows together that are processed at once."""

    few_tokens: int = 4
    """A turn of a session with so few tokens or less is not padded to a chunk."""

    min_tokens_saved: int = 256
    """Rows are prefilled in two groups, short and long ones, if that saves so many
    tokens of padding: another group is another compilation."""

    few_stops: int = 8
    """The smallest number of stop tokens that is compiled for; it is doubled."""

    progress_seconds: float = 2.0
    """With `verbose="auto"`, a progress bar is shown after so many seconds."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int":
                check_positive_int(field.name, getattr(self, field.name))

    def round_up_capacity(self, length: int) -> int:
        """Returns the smallest size of a KV cache that holds `length` positions."""
        capacity = self.min_capacity
        while capacity < length:
            half = capacity * 3 // 2
            if capacity >= 4 * self.min_capacity and length <= half:
                return half
            capacity *= 2
        return capacity

    def chunk_length(self, batch_size: int, capacity: int) -> int:
        """Returns how many tokens of each row are processed at once.

        Args:
            batch_size: int. The number of rows.
            capacity: int. The size of the KV cache.
        """
        chunk = self.min_chunk
        while (
            2 * chunk <= min(capacity // 4, self.max_chunk)
            and 2 * chunk * batch_size <= self.max_chunk_tokens
        ):
            chunk *= 2
        return min(chunk, capacity)
