"""Encodings, chat templates and answer masks against transformers, on real tokenizers."""

import numpy as np
import pytest

from lorajax.data import text

pytestmark = pytest.mark.formats
transformers = pytest.importorskip("transformers")

TEXTS = ["Once upon a time, there was a café.", "a", 'He said "no".\n\n  Twice – 你好 🙂', "x" * 40]
TALK = [
    {"role": "user", "content": "Who are you?  "},
    {"role": "assistant", "content": "Nobody, and you?"},
    {"role": "user", "content": "Nobody <too>"},
    {"role": "assistant", "content": "Then there's a pair of us."},
]
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
    {% generation %}
{{ message['content'] + '<|im_end|>' }}
    {%- endgeneration %}
    {% else %}
{{ message['content'] + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
{{ messages | tojson }}{{ messages | tojson(indent=1) }}"""
PLAIN = CHATML.replace("{% generation %}", "").replace("{%- endgeneration %}", "")


@pytest.mark.parametrize("name", ["stories260k", "minilm-l6"])
def test_encodings_are_those_of_transformers(data_dir, name):
    ours = text.Tokenizer(data_dir / name)
    theirs = transformers.AutoTokenizer.from_pretrained(data_dir / name)
    pairs = (None, TEXTS[::-1]) if name == "minilm-l6" else (None,)
    for second in pairs:
        for length in (None, 8):
            want = theirs(TEXTS, second, truncation=length is not None, max_length=length)
            found = ours.encode(TEXTS, second, max_length=length)
            assert [each.tokens.tolist() for each in found] == want["input_ids"]
            if second:
                assert [each.types.tolist() for each in found] == want["token_type_ids"]
    assert ours.size == len(theirs) and ours.fill == theirs.pad_token_id


@pytest.mark.parametrize("source", [CHATML, PLAIN])
def test_templates_and_answers_are_those_of_transformers(data_dir, source):
    theirs = transformers.AutoTokenizer.from_pretrained(data_dir / "stories260k")
    tokenizer = text.Tokenizer(data_dir / "stories260k")
    template = text.Template(source, tokenizer.special)
    options = {"chat_template": source, "tokenize": False}
    for prompt in (False, True):
        want = theirs.apply_chat_template(TALK, add_generation_prompt=prompt, **options)
        assert template.render(TALK, prompt) == want
    if not template.marked:
        return
    whole, spans = template.answers(TALK)
    (found,) = tokenizer.encode([whole], special=False, spans=True)
    options |= {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    want = theirs.apply_chat_template(TALK, **options)
    assert found.tokens.tolist() == want["input_ids"]
    begin = found.spans[:, 0]
    inside = np.any([(low <= begin) & (begin < high) for low, high in spans], axis=0)
    assert inside.astype(int).tolist() == want["assistant_masks"]
