"""Training on conversations: what is learned, and that it is all that is learned."""

import keras
import keras_hub
import numpy as np
import pytest

from blocks import CausalLMPreprocessor, JsonTokenizer, PackedDocuments
from tests.blocks.test_packing import documents_of
from tests.helpers import assert_close, raises, to_numpy
from tests.made_tokenizers import byte_level
from tests.models import EagerLM, make_backbone, make_lm

pytestmark = pytest.mark.same_everywhere

# As ChatML, in which the byte 1 ends a turn.
TEMPLATE = """\
{% for message in messages %}
{{ '<' + message.role + '>\\n' }}{% generation %}{{ message.content + '\x01' }}{% endgeneration %}{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<assistant>\\n' }}
{%- endif %}
"""
# Without a token at which `generate` stops.
PLAIN = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}"
# Drops what was thought in all answers but the last, as Qwen3's.
THINKING = """\
{% for m in messages %}{{ '<' + m.role + '>' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
{%- else %}{{ m.content }}{% endif %}{{ '\x01' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
# Ends the text after the last turn, as Phi-3's, and so says more there than in the middle.
ENDED = """\
{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\x01' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ '\x01' }}{% endif %}"""


def say(*contents, first="user"):
    """A conversation of two that take turns."""
    other = {"user": "assistant", "assistant": "user", "system": "user"}
    chat, role = [], first
    for content in contents:
        chat.append({"role": role, "content": content})
        role = other[role]
    return chat


CHATS = [
    say("Hi", "Hello.", "And?", "No é"),
    say("Be brief.", "a", "bc", "d", first="system"),
    # Two answers, one after the other.
    [*say("x", "y"), {"role": "assistant", "content": "z"}],
]


def preprocessor_of(template=TEMPLATE, length=96, **kwargs):
    tokenizer = keras_hub.tokenizers.ByteTokenizer(lowercase=False)
    special = {"start_token": 2, "end_token": 1, "chat_template": template}
    return CausalLMPreprocessor(tokenizer, length, **{**special, **kwargs})


def chat_lm(template=TEMPLATE, **kwargs):
    keras.utils.set_random_seed(0)
    backbone = make_backbone(num_layers=1, vocabulary_size=256, max_sequence_length=96)
    lm = EagerLM(backbone, preprocessor_of(template, **kwargs))
    lm.compile(keras.optimizers.Adam(1e-2))
    return lm


def by_hand(chat, length=96):
    """The tokens of a conversation, the next of each, and which of these are learned."""
    tokens, learned = [2], [0]
    for message in chat:
        content = [*message["content"].encode(), 1]
        parts = [f"<{message['role']}>\n".encode(), content, b"\n"]
        tokens += [x for part in parts for x in part]
        is_answer = int(message["role"] == "assistant")
        learned += [0] * len(parts[0]) + [is_answer] * len(content) + [0]
    row = np.zeros((3, length + 1), "int32")
    row[:, : len(tokens)] = tokens, [1] * len(tokens), learned
    return {
        "token_ids": row[0, :-1],
        "padding_mask": row[1, :-1],
        "targets": row[0, 1:],
        "weights": row[2, 1:],
    }


def arrays(chats):
    """`(x, y, sample_weight)` of conversations, made by hand."""
    rows = [by_hand(chat) for chat in chats]
    found = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    y, weights = found.pop("targets"), found.pop("weights").astype("float32")
    return found, y, weights


def learned_texts(preprocessor, chats):
    """What is learned of each conversation, as text."""
    _, y, weights = map(np.asarray, preprocessor({"messages": chats}))
    return [bytes(row[mask].astype("uint8")).decode() for row, mask in zip(y, weights)]


def test_what_the_assistant_says_is_learned():
    found, expected = preprocessor_of()({"messages": CHATS}), arrays(CHATS)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected)):
        np.testing.assert_array_equal(np.asarray(a), b)
    learned = learned_texts(preprocessor_of(), CHATS)
    assert learned == ["Hello.\x01No é\x01", "bc\x01", "y\x01z\x01"]


def test_masks_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = TEMPLATE.replace("\x01", "<|end|>")
    template = template.replace("{% generation %}", "{% if message.role == 'user' %}")
    template = template.replace(
        "{{ message.content + '<|end|>' }}{% endgeneration %}",
        "{{ message.content + '<|end|>' }}{% else %}{% generation %}"
        "{{ message.content + '<|end|>' }}{% endgeneration %}{% endif %}",
    )
    chats = [say("How's it?\n", "Größe 1234!", "  你好", "The end"), say("a", "b")]
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level(), encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="<|end|>"
    )
    expected = reference.apply_chat_template(
        chats,
        chat_template=template,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    tokenizer = JsonTokenizer(byte_level())
    preprocessor = CausalLMPreprocessor(
        tokenizer, 96, end_token="<|end|>", chat_template=template
    )
    x, y, weights = preprocessor({"messages": chats})
    for i, tokens in enumerate(expected["input_ids"]):
        n = len(tokens) - 1
        assert x["token_ids"][i, :n].tolist() == tokens[:-1]
        assert y[i, :n].tolist() == tokens[1:]
        mask = expected["assistant_masks"][i][1:]
        assert sum(mask) and weights[i].astype(int).tolist() == mask + [0] * (96 - n)


def test_what_the_user_says_is_no_target():
    others = [
        [
            {**x, "content": "?" * len(x["content"].encode())}
            if x["role"] != "assistant"
            else x
            for x in chat
        ]
        for chat in CHATS
    ]
    (x, y, weights), found = (
        preprocessor_of()({"messages": z}) for z in (CHATS, others)
    )
    assert (x["token_ids"] != found[0]["token_ids"]).any()
    np.testing.assert_array_equal(weights, found[2])
    np.testing.assert_array_equal(y * weights, found[1] * found[2])


def test_the_loss_is_that_of_tokens_with_weights():
    x, y, weights = arrays(CHATS)
    by_chats, by_tokens = chat_lm(), chat_lm()
    expected = by_tokens.evaluate(x, y, sample_weight=weights, verbose=0)
    assert_close(by_chats.evaluate({"messages": CHATS}, verbose=0), expected)
    one = by_chats.evaluate({"messages": CHATS[:1]}, verbose=0)
    rows = {"sample_weight": [1, 0, 0], "verbose": 0}
    assert_close(by_chats.evaluate({"messages": CHATS}, **rows), one)
    with raises(ValueError, "`sample_weight`", "(3,)", "Received"):
        by_chats.fit({"messages": CHATS}, sample_weight=weights, verbose=0)
    # By the log-probabilities of what was learned.
    logits = to_numpy(by_tokens(x)).astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - chosen
    assert_close(expected[0], (losses * weights).sum() / weights.sum(), atol=1e-4)
    options = {"batch_size": 3, "epochs": 2, "verbose": 0}
    data = {"messages": CHATS}
    found = by_chats.fit(data, validation_data=data, **options).history
    held_out = (x, y, weights)
    expected = by_tokens.fit(
        x, y, sample_weight=weights, validation_data=held_out, **options
    ).history
    assert found.keys() == expected.keys() and "val_loss" in found
    for name in found.keys() - {"tokens_per_second"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(CHATS)

    def __getitem__(self, i):
        return {"messages": CHATS[i : i + 1]}


def test_batches():
    lm = chat_lm()
    expected = lm.evaluate({"messages": CHATS}, verbose=0)
    kinds = [Batches(), ({"messages": [x]} for x in CHATS)]
    kinds += [PackedDocuments({"messages": CHATS}, lm.preprocessor, 96)]
    for data in kinds:
        assert_close(lm.evaluate(data, verbose=0), expected, atol=1e-5)
    losses = []
    for data in (Batches(), ({"messages": [x]} for x in CHATS), {"messages": CHATS}):
        lm = chat_lm()
        history = lm.fit(
            data,
            validation_data={"messages": CHATS},
            batch_size=1 if isinstance(data, dict) else None,
            shuffle=False,
            verbose=0,
        ).history
        losses.append([*history["loss"], *history["val_loss"]])
    assert_close(losses[0], losses[1], atol=1e-5)
    assert_close(losses[0], losses[2], atol=1e-5)
    with raises(TypeError, "from a generator or a `keras.utils.PyDataset`"):
        lm.fit(Listed(), verbose=0)


class Listed:
    """An iterable that is none of Keras's kinds."""

    def __iter__(self):
        return iter([{"messages": CHATS}])


def test_a_table_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    # With a key that only one message has: the others have `None` there.
    chats = [[{"name": "A", **CHATS[0][0]}, *CHATS[0][1:]], *CHATS[1:]]
    table = datasets.Dataset.from_dict({"messages": chats, "id": [1, 2, 3]})
    lm = chat_lm()
    with raises(TypeError, "`x` must have `messages` alone", "select_columns"):
        lm.evaluate(table, verbose=0)
    found = lm.evaluate(table.select_columns("messages"), verbose=0)
    assert_close(found, lm.evaluate({"messages": CHATS}, verbose=0), atol=1e-6)


def test_packed_rows_have_the_same_targets():
    preprocessor = preprocessor_of()
    packed = documents_of(PackedDocuments({"messages": CHATS}, preprocessor))
    expected = []
    for chat in CHATS:
        row = by_hand(chat)
        n = row["padding_mask"].sum()
        # The last token has no target.
        expected.append([row[x][: n - 1] for x in ("token_ids", "targets", "weights")])
    found, expected = (
        sorted([x.tolist() for x in parts] for parts in some)
        for some in (packed, expected)
    )
    assert found == expected


def test_where_turns_end():
    # No stop token in the text: the end token ends the last answer.
    plain = preprocessor_of(PLAIN)
    assert learned_texts(plain, CHATS[:2]) == ["a:Hello.\na:No é\n\x01", "a:bc\n"]
    without = preprocessor_of(PLAIN, add_end_token=False, add_start_token=False)
    assert learned_texts(without, CHATS[:1]) == ["a:Hello.\na:No é\n"]
    assert without({"messages": CHATS[:1]})[0]["token_ids"][0, 0] == ord("u")
    assert learned_texts(preprocessor_of(ENDED), CHATS[:1]) == ["Hello.\x01No é\x01"]
    # The template has written the start token.
    started = preprocessor_of("\x02" + TEMPLATE)({"messages": CHATS})
    np.testing.assert_array_equal(started[1], arrays(CHATS)[1])


def test_a_row_is_cut():
    x, y, weights = preprocessor_of(length=16)({"messages": CHATS[:1]})
    whole = by_hand(CHATS[0])
    assert x["token_ids"].tolist() == [whole["token_ids"][:16].tolist()]
    assert y.tolist() == [whole["targets"][:16].tolist()]
    assert not weights.any()


def test_templates_that_change_what_was_said():
    chat = say("a", "<think>b</think>c", "d", "<think>e</think>f")
    preprocessor = preprocessor_of(THINKING)
    assert learned_texts(preprocessor, [chat[:2]]) == ["<think>b</think>c\x01"]
    parts = ("Conversation 1", "message 1", "'<think>b</think>c", "one answer")
    with raises(ValueError, *parts):
        preprocessor({"messages": [chat[:2], chat]})
    # The prompt begins a thought that the answer lacks.
    template = TEMPLATE.replace("'<assistant>\\n'", "'<assistant>\\n<think>'")
    with raises(ValueError, "Conversation 0", "message 1", "'<think>'"):
        preprocessor_of(template)({"messages": CHATS})
    # As above, without stop tokens.
    template = PLAIN.replace(
        "m.content +", "(m.content if loop.last or m.role == 'user' else 'x') +"
    )
    with raises(ValueError, "Conversation 0", "message 1", "'Hello.\\n'"):
        preprocessor_of(template)({"messages": CHATS})


@pytest.mark.parametrize(
    ("messages", "kind", "parts"),
    [
        ([], ValueError, ["no conversation"]),
        ("Hi", TypeError, ["Received: messages='Hi'"]),
        (CHATS[0], TypeError, ["list of conversations", "Conversation 0 is {'role'"]),
        ([CHATS[0], "Hi"], TypeError, ["Conversation 1 is 'Hi'"]),
        ([CHATS[0], ["Hi"]], TypeError, ["Conversation 1 is list('Hi')"]),
        ([CHATS[0], []], ValueError, ["of the assistant", "Conversation 1"]),
        ([say("Hi")], ValueError, ["of the assistant", "['user']"]),
        ([say("Hi", first="assistant")], ValueError, ["after one of the system"]),
        ([[*say("a", "b"), {}]], ValueError, ["Conversation 0", "Message 2 is {}"]),
        ([say("a", {1})], TypeError, ["Conversation 0", "plain data"]),
        ([say("a", 1)], ValueError, ["Conversation 0", "template failed"]),
    ],
)
def test_odd_conversations(messages, kind, parts):
    lm = chat_lm()
    for call in (lm.fit, lm.evaluate):
        with raises(kind, "`messages`", *parts):
            call({"messages": messages}, verbose=0)


def test_what_conversations_need():
    data = {"messages": CHATS}
    with raises(ValueError, "no `chat_template`"):
        chat_lm(None).fit(data, verbose=0)
    with raises(ValueError, "Conversations need a `blocks.CausalLMPreprocessor`"):
        make_lm(make_backbone(num_layers=1)).fit(data, verbose=0)
    with raises(TypeError, "`x` must have `messages` alone", "'id'"):
        chat_lm().fit({**data, "id": [1, 2, 3]}, verbose=0)
    with raises(TypeError, "`documents` must have `messages` alone"):
        PackedDocuments({**data, "id": [1, 2, 3]}, preprocessor_of())
    with raises(ValueError, "need a `preprocessor`"):
        PackedDocuments(data, sequence_length=8)
