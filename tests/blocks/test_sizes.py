"""Named configurations: as published, and computed here with as many parameters."""

import contextlib
import math

import keras
import pytest
from keras import ops

from blocks import CausalLM
from blocks.checkpoints import known_model_types, known_sizes
from blocks.checkpoints.architecture import find_architecture
from blocks.checkpoints.loading import weights_from
from blocks.checkpoints.sizes import make_backbone, named_sizes
from tests.helpers import raises

pytestmark = pytest.mark.same_everywhere

ON_TORCH = keras.config.backend() == "torch"
SIZES = {
    name: size
    for name, size in named_sizes().items()
    if size.config["model_type"] in known_model_types()
}
SMALL = ("gpt2_base", "smollm2_135m")
# Recurrences and experts compute numbers while they are built on torch.
TOO_SLOW = ("mamba2", "rwkv7", "qwen3_next", "retnet")
TOO_SLOW += ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2")
# Rows of OPT's positions that no token reads are left out here.
LEFT_OUT = {"opt_125m": 2 * 768}
# The smallest of each architecture.
COUNTED = {
    size.config["model_type"]: name
    for name, size in sorted(SIZES.items(), key=lambda item: -item[1].parameters)
}


@pytest.mark.parametrize(
    "name",
    [
        *SMALL,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for model_type, name in COUNTED.items()
            if name not in SMALL and model_type not in TOO_SLOW
        ),
    ],
)
def test_parameters_are_as_many_as_published(name):
    if not ON_TORCH and name not in SMALL:
        pytest.skip("weights without memory are torch's")
    # On torch's "meta" device a weight has only a shape.
    device = keras.device("meta") if ON_TORCH else contextlib.nullcontext()

    def zeros(weight):
        return ops.zeros(weight.shape, weight.dtype)

    with device, weights_from(lambda weights: zeros):
        backbone = make_backbone(name, dtype="bfloat16")
    count = sum(math.prod(weight.shape) for weight in backbone.weights)
    assert count + LEFT_OUT.get(name, 0) == SIZES[name].parameters


def test_all_configurations_are_read():
    assert len(known_sizes()) >= 50
    for name, size in SIZES.items():
        architecture = find_architecture(size.config["model_type"])
        assert architecture.read_config(size.config)["num_layers"] > 0, name


def test_errors_name_names():
    with raises(ValueError, "holds no weights", "'hf://openai-community/gpt2'"):
        CausalLM.from_preset("gpt2_base")
    with raises(ValueError, "no preset folder 'llama3_7b'", "'llama3_8b'"):
        CausalLM.from_preset("llama3_7b", load_weights=False)
    with raises(ValueError, "no preset folder 'x'", "['gpt2_base']"):
        CausalLM.from_preset("x")


@pytest.mark.slow
def test_a_name_makes_a_model():
    lm = CausalLM.from_preset("smollm2_135m", load_weights=False, dtype="bfloat16")
    assert lm.backbone.num_layers == 30
    assert lm.backbone.compute_dtype == "bfloat16"
