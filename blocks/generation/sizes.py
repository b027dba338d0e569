"""The sizes that generation is compiled for."""

from __future__ import annotations

import dataclasses

from attention.contract import check_positive_int


@dataclasses.dataclass(frozen=True)
class GenerationSizes:
    """How much generation does at once, and which sizes it compiles for.

    Each size of a batch, a KV cache or a chunk is compiled, so there are few. They
    affect the speed of generation and the number of compilations, never the outputs.
    The figures in `benchmarks/README.md` are those of the defaults.

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
    """The smallest KV cache, in positions. The next sizes are 2 and 4 times it, then
    there are two sizes for each doubling, so that few empty slots are attended. It is an
    eighth more than a power of two, as prompts are often cut to a power of two."""

    min_chunk: int = 32
    """The smallest number of tokens of each row that a prefill processes at once. A chunk
    is a power of two times this, about a fourth of the capacity, so that there is little
    padding."""

    max_chunk: int = 512
    """The largest number of tokens of each row that are processed at once. More make
    products no faster, but attend to more keys that the causal mask hides."""

    max_chunk_tokens: int = 1024
    """The largest number of tokens of all rows together that are processed at once."""

    few_tokens: int = 4
    """A turn of a session with at most so many tokens is not padded to a chunk."""

    min_tokens_saved: int = 256
    """How many tokens of padding must be saved for rows to be prefilled in two groups,
    short and long ones: another group is another compilation."""

    few_stops: int = 8
    """The smallest number of stop tokens that is compiled for; larger ones double it."""

    progress_seconds: float = 2.0
    """After how many seconds `verbose="auto"` shows a progress bar."""

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
