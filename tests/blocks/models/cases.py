"""What tables of cases are made of: a line is an architecture in one configuration.

Each kind of model has a table, `CASES`, of its own; `test_models.py` runs all of them.
"""

import functools

import pytest

from tests.blocks.models.checks import VOCABULARY_SIZE


def case(name, config, marks=(), **changes):
    """Returns a case: a class of transformers' configurations, and its arguments.

    What follows a `-` in the name says how it differs from others of the class.
    """
    arguments = {**config, **changes}
    return pytest.param(
        (f"{name.split('-')[0]}Config", arguments), id=name, marks=marks
    )


# One that shows a compiler nothing that another case does not.
like_others = functools.partial(case, marks=pytest.mark.slow)

# What configurations have in common.
DECODER = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Rotary positions.
DEFAULT = {"rope_theta": 500.0, "rope_type": "default"}
LINEAR = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_theta": 500.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Windows that are shorter than the prompts.
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
