"""transformers as a contestant, and the memory's bandwidth, both with torch."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from benchmarks.weights import ModelShape, torch_weights

BANDWIDTH_BYTES = 512 * 2**20


def torch_device() -> str:
    """The device in use: a GPU where the orchestrator left one visible."""
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
        """Rows as they are: `generate` decides how to batch them."""
        return prompts

    def generate(
        self,
        inputs: list[list[int]],
        max_length: int,
        max_new_tokens: int | None,
        stops: tuple[int, ...] | None,
    ) -> list[list[int]]:
        """Generates.

        With `max_new_tokens` ragged rows go in one batch, padded on the left as
        transformers wants them. Up to a common length they go in one batch for
        each length of prompt: in a single one every row would get as many
        tokens as the shortest prompt needs, past the positions that there are.
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
        """One call of transformers' `generate`."""
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
        """What came behind each prompt."""
        return outputs

    def logits(self, row: list[int]) -> np.ndarray:
        """The logits behind the last token of a row."""
        with torch.no_grad():
            tokens = torch.tensor([row], device=torch_device())
            return self.model(tokens).logits[0, -1].float().cpu().numpy()

    def compilations(self) -> int | None:
        """Nothing is compiled."""
        return None


class Bandwidth:
    """Reads memory as fast as it goes, for the limit of a decode step."""

    def __init__(self) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        columns = 1024
        shape = (BANDWIDTH_BYTES // 4 // columns, columns)
        self.matrix = torch.rand(shape, device=torch_device())
        self.vector = torch.ones(columns, device=torch_device())

    def measure(self, times: int = 40) -> dict[str, float]:
        """Bytes per second of several ways to read, which one read in ten exceeds.

        A product of a matrix and a vector does not everywhere read as fast as a
        plain sum does. The limit is the fastest of them: a slow one would
        flatter the share of it.
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
