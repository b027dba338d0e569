"""The tokenizer and the chat template that a GGUF file holds."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from blocks.checkpoints.gguf_file import GgufFile
from blocks.json_tokenizer import JsonTokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The rules of which llama.cpp also knows that a word that is a token is not cut, and that
# texts begin with the start token unless the file says otherwise.
_LLAMA3_RULES = ("llama-bpe", "llama3", "llama-v3", "falcon3")
# How text is cut before it is merged, by GGUF's names: a pattern, or "digits" for single
# digits and GPT-2's pattern, or `None` for GPT-2's alone.
_PATTERNS = {
    "default": None,
    "gpt-2": None,
    "smollm": "digits",
    **dict.fromkeys(_LLAMA3_RULES, _LLAMA3),
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
# Of GGUF's types of tokens.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def read_gguf_preprocessor(file: GgufFile) -> dict[str, Any]:
    """Returns arguments of a `CausalLMPreprocessor` from what a GGUF file says.

    Raises:
        ValueError: if the tokenizer is of a kind that is not read.
    """
    tokens = file.field("tokenizer.ggml.tokens")
    kind = file.field("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(file, tokens)
    elif kind == "llama":
        backend = _sentence_piece(file, tokens)
    else:
        raise ValueError(
            f"'{file.path}' has a tokenizer of kind {kind!r}; those of kind 'gpt2' and "
            "'llama' are read. Pass `preprocessor=`, or `preprocessor=None`."
        )
    types = file.field("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, special=special, normalized=False)
            for token, found in zip(tokens, types)
            if found == wanted
        ]
        add = backend.add_special_tokens if special else backend.add_tokens
        add(added)
    start, end = (file.field(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos"))
    adds = kind == "llama" or file.field("tokenizer.ggml.pre") in _LLAMA3_RULES
    add_start = file.field("tokenizer.ggml.add_bos_token", adds)
    if add_start and start is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[start]} $A", special_tokens=[(tokens[start], start)]
        )
    ends = [end, file.field("tokenizer.ggml.eot_token_id")]
    return {
        "tokenizer": JsonTokenizer(backend.to_str()),
        "start_token": start,
        "end_token": end,
        "pad_token_id": file.field("tokenizer.ggml.padding_token_id"),
        "add_start_token": bool(add_start),
        "stop_token_ids": list(dict.fromkeys(x for x in ends if x is not None)),
        "chat_template": file.field("tokenizer.chat_template"),
    }


def _byte_level(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    """Returns a tokenizer of merged bytes, as that of GPT-2."""
    merges = [tuple(pair.split(" ")) for pair in file.field("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    name = file.field("tokenizer.ggml.pre", "default")
    if name not in _PATTERNS:
        raise ValueError(
            f"'{file.path}' has a tokenizer that cuts text by the rule {name!r}; known "
            f"are {sorted(_PATTERNS)}. Pass `preprocessor=`, or `preprocessor=None`."
        )
    whole = name in _LLAMA3_RULES
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
    pattern = _PATTERNS[name]
    cut: list[Any] = []
    if pattern == "digits":
        cut.append(pre_tokenizers.Digits(individual_digits=True))
    elif pattern is not None:
        cut.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    by_regex = pattern in (None, "digits")
    cut.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut)
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentence_piece(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    """Returns a tokenizer of merged characters, with bytes for unknown ones."""
    scores = file.field("tokenizer.ggml.scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i, token in enumerate(tokens):
        # Every way to make a token of two others.
        pairs = [(token[:k], token[k:]) for k in range(1, len(token))]
        known = [x for x in pairs if x[0] in vocabulary and x[1] in vocabulary]
        known.sort(key=lambda x: (vocabulary[x[0]], vocabulary[x[1]]))
        merges += [(-scores[i], pair) for pair in known]
    # The likeliest token first.
    merges.sort(key=lambda merge: merge[0])
    unknown = tokens[file.field("tokenizer.ggml.unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            [pair for _, pair in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.field("tokenizer.ggml.add_space_prefix", True))
    spaces = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend
