"""Contestants with torch: transformers, and the memory bandwidth."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from benchmarks.weights import ModelShape, torch_weights

BANDWIDTH_BYTES = 512 * 2**20


def torch_device() -> str:
    """Returns the device: a GPU if one is visible."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Transformers:
    """transformers' own `generate`, with its default attention and cache."""

    def load(
        self, shape: ModelShape, weights: dict[str, np.ndarray], dtype: str
    ) -> None:
        """Makes the model."""
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        # Random models have no special tokens.
        no_tokens = {"bos_token_id": None, "eos_token_id": None}
        if shape.kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=shape.vocabulary_size,
                n_positions=shape.positions,
                n_embd=shape.hidden_dim,
                n_layer=shape.num_layers,
                n_head=shape.num_heads,
                n_inner=shape.intermediate_dim,
                layer_norm_epsilon=1e-5,
                **no_tokens,
            )
            model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(
                vocab_size=shape.vocabulary_size,
                hidden_size=shape.hidden_dim,
                intermediate_size=shape.intermediate_dim,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads,
                num_key_value_heads=shape.num_key_value_heads,
                max_position_embeddings=shape.positions,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                **no_tokens,
            )
            model = transformers.LlamaForCausalLM(config)
        arrays = torch_weights(shape, weights)
        model.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})
        self.model = model.to(torch_device(), getattr(torch, dtype)).eval()

    def prepare(self, prompts: list[list[int]], max_length: int) -> Any:
        """Returns the prompts as they are: `generate` makes batches of them."""
        return prompts

    def generate(
        self,
        inputs: list[list[int]],
        max_length: int,
        max_new_tokens: int | None,
        stops: tuple[int, ...] | None,
    ) -> list[list[int]]:
        """Generates, and returns the new tokens of each row.

        With `max_new_tokens` all rows are one batch, padded on the left, as
        transformers needs them. Without it there is a batch for each length of
        prompt: in one batch every row would get as many tokens as the shortest
        prompt needs, more than the model has positions for.
        """
        if max_new_tokens is not None:
            return self.generate_batch(inputs, max_new_tokens, stops)
        new: list[list[int]] = [[] for _ in inputs]
        for length in sorted({len(row) for row in inputs}):
            rows = [i for i, row in enumerate(inputs) if len(row) == length]
            batch = [inputs[i] for i in rows]
            for i, tokens in zip(
                rows, self.generate_batch(batch, max_length - length, stops)
            ):
                new[i] = tokens
        return new

    def generate_batch(
        self, rows: list[list[int]], steps: int, stops: tuple[int, ...] | None
    ) -> list[list[int]]:
        """Calls transformers' `generate` once, and returns the new tokens."""
        width = max(map(len, rows))
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        with torch.no_grad():
            outputs = self.model.generate(
                tokens.to(torch_device()),
                attention_mask=mask.to(torch_device()),
                max_new_tokens=steps,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                eos_token_id=None if stops is None else list(stops),
            )
        return outputs[:, width:].cpu().tolist()

    def new_tokens(self, rows: list[list[int]], outputs: list) -> list[list[int]]:
        """Returns the tokens after each prompt."""
        return outputs

    def logits(self, row: list[int]) -> np.ndarray:
        """Returns the logits after the last token of a row, without a KV cache."""
        with torch.no_grad():
            tokens = torch.tensor([row], device=torch_device())
            return self.model(tokens).logits[0, -1].float().cpu().numpy()

    def compilations(self) -> int | None:
        """Returns `None`, as nothing is compiled."""
        return None


class Bandwidth:
    """Measures the memory bandwidth, which limits a decode step."""

    def __init__(self) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        columns = 1024
        shape = (BANDWIDTH_BYTES // 4 // columns, columns)
        self.matrix = torch.rand(shape, device=torch_device())
        self.vector = torch.ones(columns, device=torch_device())

    def measure(self, times: int = 40) -> dict[str, float]:
        """Returns bytes per second of several operations: the 90th percentile of each.

        Which operation reads fastest differs between machines. The fastest counts: a
        slower one would make the share of the bandwidth look larger.
        """
        ways = {
            "torch.mv": lambda: torch.mv(self.matrix, self.vector),
            "torch.sum": lambda: torch.sum(self.matrix),
            "torch.amax": lambda: torch.amax(self.matrix),
        }
        found = {}
        for name, read in ways.items():
            seconds = []
            for _ in range(times):
                start = time.perf_counter()
                read()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            found[name] = BANDWIDTH_BYTES / float(np.quantile(seconds, 0.1))
        return found
