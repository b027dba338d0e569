"""GPT-OSS's files, whose weights have four bits, beside transformers."""

import json

import numpy as np
import pytest

from blocks import CausalLM
from tests.helpers import assert_close, to_numpy

pytestmark = pytest.mark.same_everywhere

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_weights_of_four_bits(tmp_path):
    from safetensors.numpy import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.GptOssConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        pad_token_id=None,
    )
    reference = transformers.GptOssForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rng = np.random.default_rng(0)
    for i, layer in enumerate(reference.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            experts, inputs, outputs = getattr(layer.mlp.experts, name).shape
            groups = (experts, outputs, inputs // 32)
            blocks = rng.integers(0, 256, (*groups, 16)).astype("uint8")
            scales = rng.integers(119, 125, groups).astype("uint8")
            path = f"model.layers.{i}.mlp.experts.{name}"
            del tensors[path]
            tensors[f"{path}_blocks"], tensors[f"{path}_scales"] = blocks, scales
            weight = convert_moe_packed_tensors(
                torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
            )
            getattr(layer.mlp.experts, name).data = weight
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    lm = CausalLM.from_preset(str(tmp_path))
    tokens = rng.integers(0, 61, (2, 7)).astype("int32")
    with torch.no_grad():
        expected = reference(torch.tensor(tokens.astype("int64"))).logits.numpy()
    found = lm({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    assert expected.std() > 0.01
    assert_close(to_numpy(found), expected)
