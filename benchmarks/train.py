"""Training compared with KerasHub and transformers, with the same weights.

Run it from the repository's root: `python -m benchmarks.train --quick`.
"""

from __future__ import annotations

from benchmarks.comparison import BACKENDS, Comparison
from benchmarks.training_cases import make_plan
from benchmarks.training_runner import TrainingRunner

TRAINING = Comparison(
    name="train",
    title="Training",
    method="AdamW",
    make_plan=make_plan,
    runner=TrainingRunner,
    backends=BACKENDS,
    quick="one small model and one case, in under 4 minutes",
)

if __name__ == "__main__":
    TRAINING.main()
