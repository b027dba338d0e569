"""Generation compared with KerasHub and transformers, with the same weights.

Run it from the repository's root: `python -m benchmarks.generate --quick`.
"""

from __future__ import annotations

from benchmarks.cases import make_plan
from benchmarks.comparison import Comparison
from benchmarks.generation_runner import GenerationRunner

GENERATION = Comparison(
    name="generate",
    title="Generation",
    method="greedy",
    make_plan=make_plan,
    runner=GenerationRunner,
    backends=("tensorflow", "jax"),
    quick="small models, in under 5 minutes",
)

if __name__ == "__main__":
    GENERATION.main()
