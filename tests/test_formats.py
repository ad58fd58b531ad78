"""Chat templates are recognised word by word or refused (formats.py), words are one token.

With NANOL2D_SHARED set to a folder that holds data/tokenizers/qwen2, its own template is recognised
too; with jinja2 installed, our text is compared with that of the templates.
"""

import json

import pytest

import sample
from conftest import LLAMA, exit_status, make_lm
from data.text import formats
from data.text.formats import RENDER, SYSTEM_PROMPTS, recognise, resolve_style
from data.text.tokenizer import load_tokenizer
from test_tokenizer import NAMES, SPECIAL, save, save_form, tokenizer_json

# In the words of SmolLM and of Qwen2, the second with any system prompt.
SMOLLM = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' "
          "+ message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
         "{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
         "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
         "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CONVERSATIONS = [
    [{"role": "user", "content": " 2+2? \n"}],
    [{"role": "system", "content": "Short."}, {"role": "user", "content": "2+2?"}],
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"},
     {"role": "user", "content": "And 3+3?"}],
]


class Chatter:
    """As much of a tokenizer as the formats use."""
    special = {"<|im_start|>": 1, "<|im_end|>": 2}
    bos_id = None
    eos_id = 2

    def __init__(self, template):
        self.template = template

    def text(self, conversation, style="auto"):
        _, render = resolve_style(style, self)
        return "".join(piece.text for piece in render(conversation, True))


@pytest.mark.parametrize("system", SYSTEM_PROMPTS)
def test_a_template_brings_its_own_system_prompt(system):
    template = QWEN2.replace("SYSTEM", system.replace("\\", "\\\\"))
    assert recognise(template) == ("qwen", system)
    assert Chatter(template).text(CONVERSATIONS[0]) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n 2+2? \n<|im_end|>"
        "\n<|im_start|>assistant\n")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [SMOLLM, QWEN2.replace("SYSTEM", SYSTEM_PROMPTS[-1])])
def test_our_text_is_the_templates_text(template, conversation):
    jinja2 = pytest.importorskip("jinja2")
    expected = jinja2.Template(template).render(messages=conversation, add_generation_prompt=True)
    assert Chatter(template).text(conversation) == expected


@pytest.mark.parametrize("template", [
    SMOLLM + "x",
    SMOLLM.replace("im_end", "im_stop"),
    "",
])
def test_a_template_that_differs_in_one_word_is_refused(template):
    assert recognise(SMOLLM) == ("qwen", "")
    assert recognise(template) == (None, "")
    with pytest.raises(ValueError, match="chat template is not supported"):
        resolve_style("auto", Chatter(template))
    # a user may choose a format by name
    assert Chatter(template).text(CONVERSATIONS[1], "qwen").startswith("<|im_start|>system\nShort")


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "a list"])
def test_sample_refuses_an_unknown_template_wherever_it_stands(place, tmp_path, capsys):
    save_form(tmp_path, "json")
    make_lm({**LLAMA, "vocab_size": 300}).save_pretrained(tmp_path)
    config = dict(NAMES)
    if place == "chat_template.jinja":
        (tmp_path / place).write_text("{{ messages }}")
    elif place == "chat_template.json":
        (tmp_path / place).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    else:
        config["chat_template"] = [{"name": "default", "template": "{{ messages }}"}]
    save(tmp_path, tokenizer_config_json=config)
    flags = [f"--init_from={tmp_path}", "--prompt=the in", "--steps=0", "--device=cpu"]
    assert exit_status(sample.main, [*flags, "--chat"]) == 2
    err = capsys.readouterr().err
    assert "chat template is not supported" in err and len(err.splitlines()) == 1
    assert exit_status(sample.main, [*flags, "--chat=plain", "--max_new_tokens=1"]) == 0


def test_a_published_template_is_recognised(shared):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / "qwen2")
    assert recognise(tokenizer.template)[0] == "qwen"


def test_every_known_template_is_of_a_format_that_we_write():
    assert set(formats.TEMPLATES.values()) <= set(RENDER)


# --- words that are one token in every text -------------------------------------------------------

def test_an_added_token_that_is_not_special_is_one_id_in_every_text(tmp_path):
    content = tokenizer_json()
    word = len(SPECIAL) + 265
    content["added_tokens"].append({"id": word, "content": "<tool_call>", "special": False})
    tokenizer = load_tokenizer(save(tmp_path, tokenizer_json=content, tokenizer_config_json=NAMES))
    text = "the <tool_call>in<|im_end|>"
    for special in (False, True):
        assert tokenizer.encode(text, special=special).count(word) == 1
        assert tokenizer.decode(tokenizer.encode(text, special=special)) == text
    # a token that ends a turn needs special=True
    assert SPECIAL["<|im_end|>"] not in tokenizer.encode(text)
    # as in training data and in a chat
    assert word in formats.encode_pieces([formats.Piece(text)], tokenizer)[0]
