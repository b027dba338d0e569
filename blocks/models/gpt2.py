"""GPT-2: `CustomBackbone` as it is."""

from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import Dense, attention_paths
from blocks.custom_backbone import CustomBackbone


@register_architecture
class GPT2(Architecture):
    """The table of GPT-2.

    Reference:

    - [Radford et al., 2019](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
    """

    model_type = "gpt2"
    transformers_class = "GPT2LMHeadModel"
    backbone_class = CustomBackbone
    config = {
        "vocabulary_size": "vocab_size",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "hidden_dim": "n_embd",
        "intermediate_dim": ("n_inner", None),
        "max_sequence_length": ("n_positions", 1024),
        "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    constants = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    base_prefix = "transformer."
    weights = {
        "transformer.wte.weight": "token_embedding/embeddings",
        "transformer.wpe.weight": "position_embedding/embeddings",
        "transformer.ln_f.weight": "layer_norm/gamma",
        "transformer.ln_f.bias": "layer_norm/beta",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "transformer.h.{i}."
    layer_weights = {
        "ln_1.weight": "attention_norm/gamma",
        "ln_1.bias": "attention_norm/beta",
        "attn.c_attn.weight": Dense(*attention_paths("kernel"), transposed=True),
        "attn.c_attn.bias": Dense(*attention_paths("bias")),
        "attn.c_proj.weight": Dense(
            "self_attention/attention_output/kernel", inputs=2, transposed=True
        ),
        "attn.c_proj.bias": "self_attention/attention_output/bias",
        "ln_2.weight": "ffn_norm/gamma",
        "ln_2.bias": "ffn_norm/beta",
        "mlp.c_fc.weight": Dense("ffn/intermediate/kernel", transposed=True),
        "mlp.c_fc.bias": "ffn/intermediate/bias",
        "mlp.c_proj.weight": Dense("ffn/output/kernel", transposed=True),
        "mlp.c_proj.bias": "ffn/output/bias",
    }
    ignored = (".attn.bias", ".attn.masked_bias")

    def read_config(self, config: dict) -> dict:
        arguments = super().read_config(config)
        width = arguments["intermediate_dim"]
        arguments["intermediate_dim"] = width or 4 * arguments["hidden_dim"]
        return arguments
