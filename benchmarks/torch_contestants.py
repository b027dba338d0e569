"""Contestants with torch: transformers, and the memory bandwidth."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.timing import fastest
from benchmarks.training_cases import ADAMW
from benchmarks.weights import ModelShape, torch_weights

BANDWIDTH_BYTES = 512 * 2**20
# How torch's profiler names products, forward and backward. The softmax of attention
# is inside of its kernel.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_")


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
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
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
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=ADAMW["learning_rate"],
            weight_decay=ADAMW["weight_decay"],
            eps=ADAMW["epsilon"],
        )

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

    def traced_steps(self) -> int:
        """Returns 0, as nothing is traced."""
        return 0

    def train(self, tokens: np.ndarray, rows: int) -> float:
        """Trains on batches of so many rows, and returns the mean loss."""
        self.model.train()
        total, batches = 0.0, np.split(tokens, len(tokens) // rows)
        for batch in batches:
            inputs = torch.from_numpy(batch).long().to(torch_device())
            # The target of the last position, too, as in Keras's `fit`.
            targets = inputs[:, 1:].contiguous()
            outputs = self.model(inputs[:, :-1], labels=targets, shift_labels=targets)
            outputs.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += outputs.loss.item()
        self.model.eval()
        return total / len(batches)

    def products_part(self, tokens: np.ndarray, rows: int) -> float:
        """Returns the products' part of the time of training, by torch's profiler.

        The larger one of two calls, as it takes time to start the profiler.
        """
        parts = []
        for _ in range(2):
            with torch.profiler.profile() as profile:
                self.train(tokens, rows)
            spent = {x.key: x.self_cpu_time_total for x in profile.key_averages()}
            products = [
                time
                for name, time in spent.items()
                if name.removeprefix("aten::").startswith(PRODUCTS)
            ]
            parts.append(sum(products) / sum(spent.values()))
        return max(parts)

    def large_product(self, size: int) -> Callable[[], object]:
        """Returns a function that multiplies two matrices of so many rows."""
        matrix = torch.rand((size, size), device=torch_device())
        return lambda: (matrix @ matrix)[0, 0].item()


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

        def synchronized(read: Callable[[], torch.Tensor]) -> None:
            read()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return {
            name: BANDWIDTH_BYTES / fastest(lambda read=read: synchronized(read), times)
            for name, read in ways.items()
        }
