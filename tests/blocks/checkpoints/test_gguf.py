"""GGUF files: the same model as the folder that they were made from."""

import numpy as np
import pytest

from blocks import CausalLM
from blocks.checkpoints.architecture import find_architecture
from blocks.checkpoints.gguf_file import GgufFile
from blocks.gguf_tokenizer import read_gguf_preprocessor
from blocks.models.llama import LlamaBackbone
from tests.helpers import raises, to_numpy
from tests.models import make_backbone, prompts

pytestmark = pytest.mark.same_everywhere

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
TOKENS = ["<s>", "</s>", "<|im|>", *"abcdefghijklm", "Ġ", "ab", "Ġc", *"123456", "abc"]
MERGES = ["a b", "Ġ c"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def write(
    path, lm, quantized=False, architecture="llama", pre="smollm", add_start=True
):
    """Writes a model as llama.cpp's converter does."""
    backbone = lm.backbone
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(backbone.num_layers)
    writer.add_context_length(backbone.max_sequence_length)
    writer.add_embedding_length(backbone.hidden_dim)
    writer.add_feed_forward_length(backbone.intermediate_dim)
    writer.add_head_count(backbone.num_heads)
    writer.add_head_count_kv(backbone.num_key_value_heads)
    writer.add_layer_norm_rms_eps(backbone.layer_norm_epsilon)
    writer.add_rope_freq_base(backbone.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if add_start is not None:
        writer.add_add_bos_token(add_start)
    writer.add_chat_template(TEMPLATE)
    weights = {w.path: to_numpy(w.value) for w in backbone.weights}

    def add(name, path, heads=None):
        x = weights[path]
        if path.endswith("kernel"):
            inputs = 2 if "attention_output" in path else 1
            x = x.reshape((int(np.prod(x.shape[:inputs])), -1)).T
        if heads:
            # Rotated pairs side by side, in place of half a head apart.
            x = x.reshape((heads, 2, -1, x.shape[1])).swapaxes(1, 2).reshape(x.shape)
        x = np.ascontiguousarray(x)
        kind = None
        if quantized and x.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            x = gguf.quantize(x, kind)
        writer.add_tensor(name, x, raw_dtype=kind)

    add("token_embd.weight", "token_embedding/embeddings")
    add("output_norm.weight", "layer_norm/scale")
    for i in range(backbone.num_layers):
        block = f"transformer_layer_{i}/"
        for name, part, heads in (
            ("attn_q", "self_attention/query", backbone.num_heads),
            ("attn_k", "self_attention/key", backbone.num_key_value_heads),
            ("attn_v", "self_attention/value", None),
            ("attn_output", "self_attention/attention_output", None),
            ("ffn_gate", "ffn/gate", None),
            ("ffn_up", "ffn/intermediate", None),
            ("ffn_down", "ffn/output", None),
        ):
            add(f"blk.{i}.{name}.weight", f"{block}{part}/kernel", heads)
        add(f"blk.{i}.attn_norm.weight", f"{block}attention_norm/scale")
        add(f"blk.{i}.ffn_norm.weight", f"{block}ffn_norm/scale")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture(scope="module")
def llama():
    backbone = make_backbone(
        LlamaBackbone,
        vocabulary_size=len(TOKENS),
        hidden_dim=32,
        num_key_value_heads=2,
        rope_theta=500.0,
    )
    return CausalLM(backbone)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_model_its_tokenizer_and_its_template(quantized, llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama, quantized)
    loaded = CausalLM.from_preset(path)
    x = prompts([[3, 4, 5, 6, 7, 8], [9, 10]])
    outputs, expected = to_numpy(loaded(x)), to_numpy(llama(x))
    difference = np.abs(outputs - expected).max() / np.abs(expected).max()
    if quantized:
        assert 0 < difference < 0.1
    else:
        assert difference == 0
    preprocessor = loaded.preprocessor
    # Digits are by themselves, and so the space before them, too.
    ids = preprocessor.tokenizer(["ab c 12<|im|>"])[0]
    assert [TOKENS[i] for i in ids] == ["ab", "Ġc", "Ġ", "1", "2", "<|im|>"]
    assert (preprocessor.start_token_id, preprocessor.stop_token_ids) == (0, (1,))
    assert loaded.apply_chat_template([{"role": "user", "content": "ab"}]) == "ab</s>"


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "falcon3"])
@pytest.mark.parametrize("said", [None, False])
def test_words_of_llama_3_are_tokens_whole(pre, said, llama, tmp_path):
    """As its tokenizer.json says, and as llama.cpp knows."""
    path = write(tmp_path / "model.gguf", llama, pre=pre, add_start=said)
    found = read_gguf_preprocessor(GgufFile(path))
    assert found["add_start_token"] == (said is None)
    model = tokenizers.models.BPE(
        {token: i for i, token in enumerate(TOKENS)},
        [tuple(pair.split()) for pair in MERGES],
        ignore_merges=True,
    )
    expected = tokenizers.Tokenizer(model)
    expected.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    for text in ("abc ab", "abc12 c"):
        ids = found["tokenizer"]([text])[0]
        assert list(ids) == expected.encode(text).ids
        assert TOKENS.index("abc") in ids


@pytest.mark.parametrize(
    "kind, blocks, width, heads, size, scale",
    # As in the configurations of Gemma 2 9B and 27B, Gemma 3 4B and 27B.
    [
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma2", 46, 4608, 32, 128, 144),
        ("gemma3", 34, 2560, 8, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),
    ],
)
def test_scales_and_caps_of_gemma(kind, blocks, width, heads, size, scale, tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), kind)
    writer.add_block_count(blocks)
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    writer.add_key_length(size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_final_logit_softcapping(7.0)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(5.0)
    writer.add_tensor("token_embd.weight", np.zeros((8, 16), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = GgufFile(tmp_path / "model.gguf").config()
    arguments = find_architecture(config["model_type"]).read_config(config)
    assert (arguments["query_scalar"] or arguments["key_dim"]) == scale
    assert arguments["attention_soft_cap"] == (5 if kind == "gemma2" else None)
    assert arguments["logit_soft_cap"] == 7


def test_files_that_are_refused(llama, tmp_path):
    write(tmp_path / "model.gguf", llama)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "model.gguf").read_bytes()[:3000])
    with raises(ValueError, "damaged or truncated"):
        CausalLM.from_preset(str(cut))
    other = write(tmp_path / "other.gguf", llama, architecture="bert")
    with raises(ValueError, "'bert'", "'llama'"):
        GgufFile(other)
    strange = write(tmp_path / "strange.gguf", llama, pre="strange")
    with raises(ValueError, "'strange'", "preprocessor=None"):
        CausalLM.from_preset(strange)
    assert CausalLM.from_preset(strange, preprocessor=None).preprocessor is None
