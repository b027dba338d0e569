"""Chat templates and stop tokens: what a published model's folder says about text."""

import json

import pytest

from blocks import CausalLMPreprocessor, JsonTokenizer
from tests.helpers import raises
from tests.made_tokenizers import byte_level
from tests.models import EagerLM, make_backbone, make_lm

pytestmark = pytest.mark.same_everywhere

CHATML = """\
{%- if tools %}
{{ '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{ '<|im_end|>' }}
{% endif %}
{% for message in messages %}
{% if message.role == 'skip' %}{% continue %}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set date = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date + "\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}<|eot_id|>
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

MISTRAL = """\
{{ bos_token }}{% set ns = namespace(index=0) %}{% for message in messages %}
{%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- set ns.index = ns.index + 1 %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

USER = {"role": "user", "content": "  Größe? <b>你好</b> & 'x' 🤖\n"}
ANSWER = {"role": "assistant", "content": "Yes. "}
CALL = {"function": {"name": "add", "arguments": {"é": [1, 2.5, None, True]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "„é“ <a>"}}]
CHATS = [
    ([USER], {}),
    ([USER, ANSWER, USER], {"add_generation_prompt": False}),
    ([[USER], [USER, ANSWER]], {}),
    ([{"role": "system", "content": "Be brief."}, USER], {}),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
    ([USER], {"tools": TOOLS}),
    ([USER], {"date_string": "1 May", "bos_token": "<other>"}),
]


def preprocessor_of(template=None, **kwargs):
    special = {"start_token": "<s>", "end_token": "<|end|>", "sequence_length": 64}
    tokenizer = JsonTokenizer(byte_level())
    arguments = {**special, "chat_template": template, **kwargs}
    return CausalLMPreprocessor(tokenizer, **arguments)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, GEMMA])
def test_texts_are_those_of_transformers(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level(), encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="<|end|>"
    )
    reference.chat_template = template
    preprocessor = preprocessor_of(template)
    compared = 0
    for messages, options in CHATS:
        options = {"add_generation_prompt": True, **options}
        try:
            expected = reference.apply_chat_template(
                messages, tokenize=False, **options
            )
        except Exception:
            # Some know no system and no calls of tools.
            with raises(ValueError, "template failed on these messages"):
                preprocessor.apply_chat_template(messages, **options)
            continue
        compared += 1
        assert preprocessor.apply_chat_template(messages, **options) == expected
    assert compared >= 4


def test_a_conversation_as_text():
    lm = make_lm(
        make_backbone(num_layers=1, vocabulary_size=600), preprocessor_of(CHATML)
    )
    skipped = {"role": "skip", "content": ""}
    assert lm.apply_chat_template([ANSWER, skipped, {**ANSWER, "content": "é"}]) == (
        "<|im_start|>assistant\nYes. <|im_end|>\n<|im_start|>assistant\né<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "„é“ <a>" in lm.apply_chat_template([USER], TOOLS)


def test_several_templates():
    named = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].name }}"}
    preprocessor = preprocessor_of(named)
    assert preprocessor.apply_chat_template([ANSWER]) == "Yes. "
    assert preprocessor.apply_chat_template([ANSWER], [{"name": "add"}]) == "add"
    with raises(ValueError, "none is the default", "['rag']"):
        preprocessor_of({"rag": ""}).apply_chat_template([ANSWER])


@pytest.mark.parametrize(
    ("template", "messages", "kind", "part"),
    [
        (None, [USER], ValueError, "no `chat_template`"),
        ("{% for %}", [USER], ValueError, "no template that Jinja2 can read"),
        ("", "Hi", TypeError, "`messages` must be a list of dicts"),
        ("", [], TypeError, "`messages` must be a list of dicts"),
        ("", ["Hi"], ValueError, "Message 0 is 'Hi'"),
        ("", [USER, {"role": "user"}], ValueError, "Message 1 is {'role'"),
        ("", [[USER], [{"content": "a"}]], ValueError, "`role` and `content`"),
        ("", [{**USER, "image": object()}], TypeError, "plain data"),
        (MISTRAL, [USER, USER], ValueError, "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", [USER], ValueError, "TypeError"),
        ("{{ messages[0].a.b }}", [USER], ValueError, "UndefinedError"),
        # What would reach the interpreter, or change what belongs to the user.
        ("{{ ''.__class__.__mro__ }}", [USER], ValueError, "SecurityError"),
        ("{{ lipsum.__globals__['os'] }}", [USER], ValueError, "SecurityError"),
        (
            "{{ '{0.__class__.__mro__}'.format(1) }}",
            [USER],
            ValueError,
            "SecurityError",
        ),
        ("{{ messages.append(1) }}", [USER], ValueError, "SecurityError"),
        ("{% include '/etc/passwd' %}", [USER], ValueError, "TypeError"),
    ],
)
def test_what_goes_wrong(template, messages, kind, part):
    with raises(kind, part):
        preprocessor_of(template).apply_chat_template(messages)


def test_tools_are_schemas():
    with raises(TypeError, "`tools` must be a list of dicts"):
        preprocessor_of("").apply_chat_template([USER], tools={"name": "add"})
    with raises(ValueError, "Chat templates belong to a"):
        make_lm(make_backbone(num_layers=1)).apply_chat_template([USER])


# === Folders of published models ===


def folder_of(path, **files):
    (path / "tokenizer.json").write_text(byte_level(files.pop("start", None)))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def read(preprocessor):
    start = preprocessor.start_token_id if preprocessor.add_start_token else None
    return start, preprocessor.end_token_id, preprocessor.stop_token_ids


END = {"content": "<|end|>", "lstrip": False, "__type": "AddedToken"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None, ())),
        ({"start": "<s>"}, (0, None, ())),
        ({"tokenizer_config": {"eos_token": "<|end|>"}}, (None, 1, (1,))),
        ({"tokenizer_config": {"eos_token": END}}, (None, 1, (1,))),
        ({"special_tokens_map": {"eos_token": END}}, (None, 1, (1,))),
        ({"tokenizer_config": {"eos_token": "<other>"}}, (None, None, ())),
        ({"generation_config": {"eos_token_id": 2}}, (None, 2, (2,))),
        (
            {
                "tokenizer_config": {"eos_token": "<|end|>", "bos_token": "<s>"},
                "config": {"eos_token_id": 9},
                "generation_config": {"eos_token_id": [2, 1], "pad_token_id": -1},
            },
            (None, 1, (2, 1)),
        ),
        # As in transformers 5, the tokenizer.json decides.
        (
            {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}},
            (None, None, ()),
        ),
        ({"config": {"eos_token_id": 3}}, (None, 3, (3,))),
        ({"generation_config": {"eos_token_id": [5, 600]}}, (None, 5, (5,))),
    ],
)
def test_folders(tmp_path, files, expected):
    folder = folder_of(tmp_path, **files)
    preprocessor = CausalLMPreprocessor.from_hugging_face(folder, sequence_length=9)
    assert read(preprocessor) == expected
    assert preprocessor.sequence_length == 9


def test_templates_and_padding_of_folders(tmp_path):
    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    for template, expected in (("A", "A"), (named, {"default": "A", "rag": "B"})):
        config = {"chat_template": template, "pad_token": "<pad>", "bos_token": "<s>"}
        folder = folder_of(tmp_path, tokenizer_config=config)
        preprocessor = CausalLMPreprocessor.from_hugging_face(str(folder))
        assert preprocessor.chat_template == expected
        assert preprocessor.pad_token_id == 2
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ pad_token }}ü")
    preprocessor = CausalLMPreprocessor.from_hugging_face(folder, end_token=3)
    assert preprocessor.apply_chat_template([USER]) == "<s><pad>ü"
    assert preprocessor.end_token_id == 3


def test_added_tokens_that_the_model_lacks(tmp_path):
    content = json.loads(byte_level())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 600})
    content["added_tokens"][-1]["content"] = "<image>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for size, expected in ((None, 601), (601, 601), (700, 601), (600, 600)):
        preprocessor = CausalLMPreprocessor.from_hugging_face(
            tmp_path, vocabulary_size=size
        )
        assert preprocessor.tokenizer.vocabulary_size() == expected


def test_folders_with_errors(tmp_path):
    with raises(ValueError, "has no tokenizer.json", str(tmp_path)):
        CausalLMPreprocessor.from_hugging_face(tmp_path)
    folder_of(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for content in ("{", "[]", '{"a": "\ud83e"'.encode("utf-8", "surrogatepass")):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with raises(ValueError, str(path)):
            CausalLMPreprocessor.from_hugging_face(tmp_path)


# === Generation ===


@pytest.mark.slow
def test_generation_stops_at_each_stop_token():
    backbone = make_backbone(num_layers=1, vocabulary_size=600)
    lm = EagerLM(backbone, preprocessor_of())
    lm.compile(sampler="greedy")
    tokenizer = lm.preprocessor.tokenizer
    prompt = "a<|end|>b"
    outputs = lm.generate([67, 1, 68], max_new_tokens=8, stop_token_ids=None)
    new = outputs["token_ids"][3:].tolist()
    third = next(i for i in range(2, 8) if new[i] not in new[:i])
    stops = [599, new[third]]
    lm.preprocessor = preprocessor_of(stop_token_ids=stops, add_start_token=False)
    answer = lm.generate(prompt, max_new_tokens=8, strip_prompt=True)
    assert answer == tokenizer.detokenize(new[:third])
    assert "".join(lm.stream(prompt, max_new_tokens=8, strip_prompt=True)) == answer


@pytest.mark.slow
def test_turns_of_a_session():
    """The second turn adds only the text that is new, as a user would."""
    template = CHATML.replace("<|im_end|>", "<|end|>")
    backbone = make_backbone(num_layers=1, vocabulary_size=600, learned_positions=False)
    lm = EagerLM(backbone, preprocessor_of(template))
    lm.compile(sampler="greedy")
    tokenizer, stops = lm.preprocessor.tokenizer, lm.preprocessor.stop_token_ids
    text = lm.apply_chat_template([USER])
    session = lm.start(text)
    answer = session.generate(max_new_tokens=4)
    text += answer
    if session.tokens[0][-1] in stops:  # or the limit ended it
        text += tokenizer.id_to_token(session.tokens[0][-1])
    messages = [USER, {"role": "assistant", "content": answer}, USER]
    whole = lm.apply_chat_template(messages)
    assert whole.startswith(text)
    before = session.num_prefilled
    new = whole[len(text) :]
    answer = session.generate(new, max_new_tokens=4)
    assert session.num_prefilled == before + len(tokenizer([new])[0]) + 1
    written = tokenizer.detokenize(session.tokens[0])
    assert (new + answer) in written and written.startswith("<s><|im_start|>user")
