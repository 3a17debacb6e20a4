"""Chat templates give the text that Hugging Face's transformers gives."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from weights.checkpoints.chat_template import ChatTemplate, load_chat_template
from weights.errors import ChatTemplateError, CheckpointError

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
{{ bos_token }}<|im_start|>system
Be kind.<|im_end|>
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TRIMMED = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% endfor %}"
MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
LOOPS = "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
TOOLS = "{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{{ enable_thinking }}"
MESSAGES = [
    {"role": "user", "content": "one <b> 'é' "},
    {"role": "assistant", "content": "two & more"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "<sum> für zwei"}}


@pytest.mark.parametrize("source", [CHATML, TRIMMED, MARKED, LOOPS], ids=lambda s: s[:20])
@pytest.mark.parametrize("prompt", [True, False])
def test_text_equals_that_of_transformers(source, prompt):
    ours = ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, add_generation_prompt=prompt)
    (theirs,), _ = render_jinja_template(
        conversations=[MESSAGES],
        chat_template=source,
        add_generation_prompt=prompt,
        bos_token="<s>",
    )
    assert ours == theirs


@pytest.mark.parametrize("source", [CHATML, TRIMMED])
def test_a_continued_message_ends_as_in_transformers(source):
    messages = [MESSAGES[0], {"role": "assistant", "content": "and so on "}]
    ours = ChatTemplate(source).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    (theirs,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        continue_final_message=True,
        bos_token="",
    )
    assert ours == theirs


def test_tools_and_variables_reach_the_template():
    ours = ChatTemplate(TOOLS).render(MESSAGES, tools=[TOOL], variables={"enable_thinking": False})
    assert ours == json.dumps(TOOL, ensure_ascii=False, indent=2) + "False"


def test_a_model_with_several_templates_has_one_for_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_chat_template(tmp_path)
    assert template.render(MESSAGES) == "plain"
    assert template.render(MESSAGES, tools=[TOOL]) == "tools"


def test_where_a_folder_has_its_template(tmp_path):
    assert load_chat_template(tmp_path) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "third"}')
    assert load_chat_template(tmp_path).render(MESSAGES) == "third"
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}"}
    config |= {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path).render(MESSAGES) == "<s></s>"
    (tmp_path / "chat_template.jinja").write_text("first")
    assert load_chat_template(tmp_path).render(MESSAGES) == "first"
    (tmp_path / "own").write_text("own")
    assert load_chat_template(tmp_path, tmp_path / "own").render(MESSAGES) == "own"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ missing.field }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_fails_gives_one_line(source):
    with pytest.raises(ChatTemplateError, match="refuses the messages") as error:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(error.value)


def test_a_template_that_hides_the_last_message_cannot_continue_it():
    with pytest.raises(ChatTemplateError, match="does not show the last message"):
        ChatTemplate("hidden").render(MESSAGES, continue_final_message=True)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ChatTemplateError, match="not valid: TemplateSyntaxError"):
        ChatTemplate("{% if %}")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: expected a JSON object"):
        load_chat_template(tmp_path)
    with pytest.raises(CheckpointError, match="gone: cannot be read"):
        load_chat_template(tmp_path / "x", tmp_path / "gone")
