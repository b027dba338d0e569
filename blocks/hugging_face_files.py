"""Reads what a Hugging Face folder says about text: plain data, nothing is executed."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from attention.contract import describe
from blocks.checkpoints.hugging_face import write_json
from blocks.json_tokenizer import FILE_NAME, JsonTokenizer

# With what targets begin: transformers forces the second.
_DECODER_STARTS = ("decoder_start_token_id", "forced_bos_token_id")


def read_preprocessor(
    folder: str | os.PathLike, vocabulary_size: int | None
) -> dict[str, Any]:
    """Returns arguments of a `CausalLMPreprocessor`, as its `from_hugging_face`."""
    tokenizer = _read_tokenizer(folder, vocabulary_size)
    config = _read_tokens(folder)
    generation = _read_json(folder, "config.json", "generation_config.json")

    size = tokenizer.vocabulary_size()

    def known(ids: Any) -> list[int]:
        """Returns those of one id or several that are in the vocabulary."""
        ids = ids if isinstance(ids, list) else [ids]
        return [x for x in ids if isinstance(x, int) and 0 <= x < size]

    def find(kind: str) -> int | None:
        """Returns the id of a kind of special token, if there is one."""
        token_id = generation.get(f"{kind}_token_id")
        if f"{kind}_token" in config:
            token_id = _token_id(tokenizer, config[f"{kind}_token"])
        return next(iter(known(token_id)), None)

    # The file decides whether texts begin with it, as in transformers 5.
    start = tokenizer.start_token_id
    return {
        "tokenizer": tokenizer,
        "start_token": find("bos") if start is None else start,
        "end_token": find("eos"),
        "pad_token_id": find("pad"),
        "decoder_start_token": [
            x for name in _DECODER_STARTS for x in known(generation.get(name))
        ]
        or None,
        "add_start_token": start is not None,
        "stop_token_ids": known(generation.get("eos_token_id")) or None,
        "chat_template": _read_template(folder, config.get("chat_template")),
    }


def read_encoder_tokenizer(
    folder: str | os.PathLike, vocabulary_size: int | None
) -> JsonTokenizer:
    """Returns an encoder's tokenizer, which knows its tokens of padding and masks."""
    found = _read_tokens(folder)
    tokens = {}
    for name in ("pad_token", "mask_token"):
        token = found.get(name)
        tokens[name] = token.get("content") if isinstance(token, dict) else token
    return _read_tokenizer(folder, vocabulary_size, **tokens)


def read_pooling(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns what sentence-transformers wrote of arguments of a `TextEmbedder`."""
    found: dict[str, Any] = {}
    pooling = _read_json(folder, os.path.join("1_Pooling", "config.json"))
    for how in ("cls_token", "mean_tokens"):
        if pooling.get(f"pooling_mode_{how}"):
            found["pooling"] = how.split("_")[0]
    modules = pathlib.Path(folder, "modules.json")
    if modules.is_file():
        text = modules.read_text(encoding="utf-8")
        found["normalize"] = any(
            x["type"].endswith("Normalize") for x in json.loads(text)
        )
    return found


def write_pooling(
    folder: str | os.PathLike,
    pooling: str,
    normalize: bool,
    width: int,
    sequence_length: int | None,
) -> None:
    """Writes the files that `read_pooling` reads, for sentence-transformers."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules: Any = [
        {
            "idx": i,
            "name": str(i),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write_json(os.fspath(folder), "modules.json", modules[: 2 + normalize])
    os.makedirs(os.path.join(folder, "1_Pooling"), exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    said = {
        f"pooling_mode_{mode}": mode.split("_token")[0] == pooling for mode in modes
    }
    config = {"word_embedding_dimension": width, **said}
    write_json(os.fspath(folder), os.path.join("1_Pooling", "config.json"), config)
    if sequence_length is not None:
        sentences = {"max_seq_length": sequence_length, "do_lower_case": False}
        write_json(os.fspath(folder), "sentence_bert_config.json", sentences)


# Options of generation that have the same name and meaning in transformers.
_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
_PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")


def read_generation_options(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns what a `generation_config.json` says of `blocks.GenerationOptions`."""
    found = _read_json(folder, "generation_config.json")
    options = {name: found[name] for name in _PENALTIES if found.get(name)}
    if found.get("do_sample") is False:
        options["temperature"] = 0.0
    elif found.get("do_sample"):
        named = {name: found[name] for name in _OPTIONS if found.get(name) is not None}
        # transformers' defaults where it draws.
        options |= {"temperature": 1.0, "top_k": 50, **named}
    return options


def _generation_config(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options as transformers writes them."""
    known = {
        name: options[name] for name in (*_OPTIONS, *_PENALTIES) if name in options
    }
    if known.get("temperature") == 0:
        return {"do_sample": False, **{k: known[k] for k in _PENALTIES if k in known}}
    if any(name in known for name in _OPTIONS):
        return {"do_sample": True, "top_k": 0, **known}
    return known


def _read_tokens(folder: str | os.PathLike) -> dict[str, Any]:
    # Of files with the same content the later ones count.
    return _read_json(folder, "special_tokens_map.json", "tokenizer_config.json")


def _read_tokenizer(
    folder: str | os.PathLike, vocabulary_size: int | None, **tokens: Any
) -> JsonTokenizer:
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"The folder '{os.fspath(folder)}' has no {FILE_NAME}. Models that have only "
            "an older format (a `tokenizer.model`, or `vocab.json` and `merges.txt`) get "
            "one by `transformers.AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder)`."
        )
    tokenizer = JsonTokenizer(path, **tokens)
    if vocabulary_size is None or tokenizer.vocabulary_size() <= vocabulary_size:
        return tokenizer
    # Tokens of other models of a family, as of images, that this model lacks.
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    added = content.get("added_tokens") or []
    content["added_tokens"] = [x for x in added if x["id"] < vocabulary_size]
    return JsonTokenizer(json.dumps(content), **tokens)


def _read_json(folder: str | os.PathLike, *names: str) -> dict[str, Any]:
    """Returns the content of those files that are there, as one dict."""
    merged: dict[str, Any] = {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"'{path}' is damaged or truncated ({error}). Download it again."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(
                f"'{path}' must hold a JSON object. Received: {describe(content)}"
            )
        merged.update(content)
    return merged


def _token_id(tokenizer: JsonTokenizer, token: Any) -> int | None:
    """Returns the id of a token, which a config has as a string or a dict."""
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    return tokenizer.backend.token_to_id(token)


def _read_template(
    folder: str | os.PathLike, template: Any
) -> str | dict[str, str] | None:
    """Returns the template, or several by name, of files or else of a config."""
    files = [*pathlib.Path(folder, "additional_chat_templates").glob("*.jinja")]
    named = {path.stem: path.read_text(encoding="utf-8") for path in sorted(files)}
    path = pathlib.Path(folder, "chat_template.jinja")
    if path.is_file():
        template = path.read_text(encoding="utf-8")
    elif isinstance(template, list):
        return {x["name"]: x["template"] for x in template}
    return {"default": template, **named} if named else template


def write_preprocessor(
    folder: str | os.PathLike, preprocessor: Any, options: dict[str, Any]
) -> None:
    """Writes the files that `read_preprocessor` reads, for a `JsonTokenizer`.

    `options` are those of generation. Other tokenizers have no form that transformers
    reads; nothing is written for them.
    """
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if not isinstance(tokenizer, JsonTokenizer):
        return
    tokenizer.save_assets(os.fspath(folder))
    ids = {
        "bos": preprocessor.start_token_id,
        "eos": preprocessor.end_token_id,
        # That which it was given: 0 stands for none.
        "pad": preprocessor.get_config()["pad_token_id"],
    }
    names = {
        f"{kind}_token": tokenizer.id_to_token(token_id)
        for kind, token_id in ids.items()
        if token_id is not None
    }
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    if unknown is not None:
        names["unk_token"] = unknown
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    template = getattr(preprocessor, "chat_template", None)
    if isinstance(template, dict):
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in template.items()
        ]
    elif template is not None:
        path = pathlib.Path(folder, "chat_template.jinja")
        path.write_text(template, encoding="utf-8")
    generation = {f"{kind}_token_id": token_id for kind, token_id in ids.items()}
    generation["eos_token_id"] = list(preprocessor.stop_token_ids) or None
    if preprocessor.target:
        starts = zip(_DECODER_STARTS, preprocessor.target_start_token_ids)
        generation |= dict(starts)
    generation |= _generation_config(options)
    write_json(os.fspath(folder), "tokenizer_config.json", config)
    write_json(os.fspath(folder), "generation_config.json", generation)


def write_encoder_tokenizer(folder: str | os.PathLike, tokenizer: Any) -> None:
    """Writes the files that `read_encoder_tokenizer` reads, for a `JsonTokenizer`."""
    if not isinstance(tokenizer, JsonTokenizer):
        return
    tokenizer.save_assets(os.fspath(folder))
    ids = {"cls": tokenizer.start_token_id, "sep": tokenizer.end_token_id}
    names = {
        f"{kind}_token": tokenizer.id_to_token(token_id)
        for kind, token_id in ids.items()
        if token_id is not None
    }
    said = {
        **names,
        "pad_token": tokenizer.pad_token,
        "mask_token": tokenizer.mask_token,
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: token for name, token in said.items() if token is not None}
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    if unknown is not None:
        config["unk_token"] = unknown
    write_json(os.fspath(folder), "tokenizer_config.json", config)
