"""Small tokenizers of the kinds that published models have, trained here."""

import functools
import pydoc_data.topics

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

TEXTS = [*pydoc_data.topics.topics.values()][:40]

# What tokenizers disagree on.
HARD_TEXTS = [
    "",
    " ",
    "The `if` statement doesn't end: it's WE'RE 3rd",
    "1234567890 3.14159 1,000,000",
    "  leading,   runs     of\n\n\n spaces \t\t and tabs  ",
    "🤖 👩‍👩‍👧 🇩🇪 e\u0301 é ﬁ",
    "中文字符 日本語 한국어 العربية",
    "<s>a<|end|> <|end|>\n<s>",
    "\x00\x7f\ufeff\u200b\u00a0",
]


@functools.cache
def byte_level(start=None):
    """Returns the text of a `tokenizer.json` as GPT-2's, Llama 3's and Qwen's are.

    With `start`, each text begins with `<s>`.
    """
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(made, ["<s>", "<|end|>", "<pad>"], alphabet, start)


@functools.cache
def metaspace(start=None):
    """Returns the text of a `tokenizer.json` as Llama 2's and Gemma's are.

    It has a token for each byte that no other token holds, and marks spaces.
    """
    made = tokenizers.Tokenizer(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.normalizer = normalizers.Replace("\t", "  ")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokens = ["<unk>", "<s>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256))]
    return _trained(made, tokens, [], start)


def _trained(made, special, alphabet, start):
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=300,
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    if start is not None:
        token = (start, made.token_to_id(start))
        made.post_processor = TemplateProcessing(f"{start} $A", special_tokens=[token])
    return made.to_str()


@functools.cache
def word_piece():
    """Returns the text of a `tokenizer.json` as BERT's are."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(x, made.token_to_id(x)) for x in ("[CLS]", "[SEP]")],
    )
    return made.to_str()
