"""Decoding of each published architecture beside KerasHub and transformers.

    python -m benchmarks.architectures
    python -m benchmarks.architectures --only llama gemma2 --backend tensorflow

For each model type a model of some 30 million random weights is written as transformers
does, and measured as `python -m benchmarks.checkpoints` measures a real one: tokens per
second of one row, in float32; in brackets, the ratio to transformers. A dash stands for a
model type that KerasHub can't load.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import checkpoints
from benchmarks.processes import ROOT, environment

WIDTH = 512
COMMON = {
    "vocab_size": 16_384,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
# What differs, by model type.
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64},
    "gemma3_text": {"head_dim": 64},
    "phi3": {},
    "falcon": {"multi_query": True, "alibi": False},
    "gpt_neox": {},
    "bloom": {},
    "opt": {"ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH, "pad_token_id": 1},
    "stablelm": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 8, "intermediate_size": WIDTH},
    "qwen3_moe": {**EXPERTS, "head_dim": 64},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": WIDTH, "head_dim": 64},
    "deepseek_v2": {
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "mamba2": {"num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 1},
    "qwen3_next": {
        **EXPERTS,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "shared_expert_intermediate_size": WIDTH,
    },
}


def write(model_type: str, folder: str) -> None:
    """Writes a model of random weights; it runs in a process of its own."""
    import transformers

    config = transformers.AutoConfig.for_model(
        model_type, **{**COMMON, **CHANGES[model_type]}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)


def measure(model_type: str, options: argparse.Namespace) -> dict[str, float]:
    """Returns the tokens per second of each contestant that can load the model."""
    names = [f"{x}/{options.backend}" for x in ("ours", "keras_hub")]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.architectures", "--write", folder]
        command += ["--only", model_type]
        environ = environment("transformers", "cpu")
        subprocess.run(command, cwd=ROOT, env=environ, check=True)
        for name in [*names, "transformers"]:
            result = checkpoints.run(name, folder, options.new_tokens, batches=(1,))
            if result is not None:
                found[name.partition("/")[0]] = result["decode_1"]
    return found


def row(model_type: str, found: dict[str, float]) -> str:
    """Returns a row of the table."""
    base = found.get("transformers", float("nan"))
    cells = [
        f"{found[x]:.0f} ({found[x] / base:.1f}x)" if x in found else "–"
        for x in ("ours", "keras_hub")
    ]
    return f"| {model_type} | {' | '.join(cells)} | {base:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    add("--backend", default="jax", choices=("tensorflow", "jax", "torch"))
    add("--new-tokens", type=int, default=65)
    add("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.only[0], options.write)
        return
    print("| model type | here | KerasHub | transformers |", flush=True)
    print("| --- " * 4 + "|", flush=True)
    for model_type in options.only:
        print(row(model_type, measure(model_type, options)), flush=True)


if __name__ == "__main__":
    main()
