"""Texts from files to tables: what is read, what is refused, where answers are."""

import json

import numpy as np
import pytest

from lorajax.data import text

GLUE = 'sentence\tlabel\nHe said "no.\t1\n"Quoted" it\'s\t0\nplain\t1\n'


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_quote_is_a_quote_in_tabs_and_quotes_in_commas(tmp_path):
    for end in ("\n", "\r\n"):
        content = b"\xef\xbb\xbf" + GLUE.replace("\n", end).encode()
        sheet = text.read_sheet(put(tmp_path, "a.tsv", content))
        assert sheet.columns["sentence"] == ['He said "no.', '"Quoted" it\'s', "plain"]
        assert sheet.columns["label"] == ["1", "0", "1"]
    strange = "sentence\tlabel\na\u2028b\x0bc\x85\t1\n"
    assert text.read_sheet(put(tmp_path, "b.tsv", strange)).columns["sentence"] == [
        "a\u2028b\x0bc\x85"
    ]
    sheet = text.read_sheet(put(tmp_path, "c.csv", 'text,label\n"a, ""b""\nc",x\nd,y\n'))
    assert sheet.columns == {"text": ['a, "b"\nc', "d"], "label": ["x", "y"]}
    assert sheet.lines == ["line 3", "line 4"]


def test_folders_and_whole_files(tmp_path):
    for name in ("b/2", "b/1", "a/1"):
        put(tmp_path, f"classes/{name}.txt", f"text {name}")
    sheet = text.read_sheet(tmp_path / "classes")
    assert sheet.columns == {"text": ["text a/1", "text b/1", "text b/2"], "label": ["a", "b", "b"]}
    assert text.is_text(tmp_path) and text.is_text(tmp_path / "classes")
    put(tmp_path, "classes/loose.txt", "x")
    with pytest.raises(ValueError, match="has 2 folders of .txt files and 1 .txt files of its own"):
        text.read_sheet(tmp_path / "classes")
    assert text.read_sheet(put(tmp_path, "c.txt", "to be\n")).columns == {"text": ["to be\n"]}
    assert not text.is_text(tmp_path / "rows.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "is empty; it needs a header line"),
        ("a.tsv", "sentence\tlabel\n", "has no rows"),
        ("a.tsv", "sentence\tlabel\na\t1\nb\n", "line 3: it has 1 fields where the header has 2"),
        ("a.tsv", "sentence\tlabel\na\t1\t2\n", "line 2: it has 3 fields"),
        ("a.tsv", "text\ttext\na\tb\n", "each column needs a name of its own"),
        ("a.tsv", b"sentence\tlabel\ncaf\xe9\t1\n", "no UTF-8: line 2 has the byte 0xe9"),
        ("a.tsv", "sentence\tlabel\na\t1\n".encode("utf-16"), "no UTF-8: line 1"),
        ("a.csv", 'text,label\n"a,1\n', "mend its quotes"),
        ("a.csv", 'text,label\na,1,2\n', "line 2: it has 3 fields"),
        ("a.jsonl", "{}\n[1]\n", "line 2: it must be a JSON object"),
        ("a.jsonl", '{"text": 1}\n{"txt": 1}\n', "line 2: .* with the keys text"),
        ("a.jsonl", "{\n", "line 1: it is no JSON"),
        ("a.jsonl", "[" * 100_000, "it is no JSON"),
        ("a.pkl", b"\x80\x04.", "ends in '.pkl'; texts are read from folders and .tsv"),
        ("a.tsv", "sentence\tlabel\n \t1\n", "line 2: sentence is empty"),
        ("a.jsonl", lines({"text": 3, "label": 1}), "line 1: text is 3, which is no text"),
        ("a.tsv", "sentence\tlabel\na\t-1\nb\t1\n", "label is -1; a class must not be negative"),
        ("a.tsv", "sentence\tlabel\na\t1\n", "has 1 values of label"),
        ("a.tsv", "sentence\tlabel\na\t1\nb\tx\n", "label is 'x' where other rows have numbers"),
        ("a.tsv", "sentence\tlabel\na\t1.0\nb\t2.0\n", "could be a class or a number; say which"),
        ("a.tsv", "sentence\tlabel\na\t1.5\nb\tnan\n", "label is 'nan'; it must be a number"),
        ("a.tsv", "sentence\tlabel\na\t\n", "label is ''; it must be a word or a number"),
        ("a.jsonl", lines({"text": "a", "label": None}), "label is None; it must be a word"),
        ("a.tsv", "sentence\ttext\tlabel\na\tb\t1\n", "say by text which one or two are the texts"),
        ("a.tsv", "sentence\tlabel\tscore\na\tb\t1\n", "say by label which one is the answer"),
        ("a.tsv", "review\tstars\na\t1\n", "say by text which"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        text.read_texts(put(tmp_path, name, content))
    assert str(error.value).count("\n") == 0 and name in str(error.value)


def test_labels_are_classes_in_a_stated_order_or_numbers(tmp_path):
    head = "sentence1\tsentence2\tlabel\n"
    train = put(tmp_path, "a.tsv", head + "a\tb\tyes\nc\td\tno\ne\tf\tyes\n")
    test = put(tmp_path, "b.tsv", head + "g\th\tno\n")
    found = text.read_texts(train, test)
    assert (found.kind, found.classes) == ("classes", ("no", "yes"))
    assert [each.tolist() for each in found.answers] == [[1, 0, 1], [0]]
    put(tmp_path, "b.tsv", head + "g\th\tmaybe\n")
    with pytest.raises(ValueError, match="b.tsv, line 2: label is 'maybe', which .*no, yes"):
        text.read_texts(train, test)
    stars = put(tmp_path, "c.csv", "review,stars\na,10\nb,9\nc,1\n")
    found = text.read_texts(stars, text=["review"], label="stars")
    assert found.classes == ("1", "9", "10") and found.answers[0].tolist() == [2, 1, 0]
    found = text.read_texts(stars, text=["review"], label="stars", kind="numbers")
    assert found.kind == "numbers" and found.answers[0].tolist() == [10, 9, 1]
    for options, message in (
        ({"text": ["revue"]}, "text is 'revue', but .* the columns review, stars"),
        ({"text": ["review"], "label": "star"}, "label is 'star', but"),
        ({"text": ["review"], "label": "review"}, "label is 'review', which is a column of text"),
        ({"text": ["review", "review"]}, "it takes one column, or two different ones"),
        ({"kind": "words"}, "kind is 'words'; it must be one of classes"),
        ({"kind": "classes", "text": ["review", "stars"]}, "has no column of labels"),
    ):
        with pytest.raises(ValueError, match=message):
            text.read_texts(stars, **options)


def test_few_lengths_for_many_texts():
    assert text.sizes(5) == (5,) and text.sizes(512)[-4:] == (192, 256, 384, 512)
    column = text.Ragged([np.arange(n, dtype=np.int32) for n in (3, 40, 17, 100)], fill=9)
    assert column[[0]].tolist() == [[0, 1, 2] + [9] * 13]
    shapes = [column[i].shape for i in (slice(0, 2), [2, 0], [3], np.array([True, 0, 0, 0]) > 0)]
    assert shapes == [(2, 48), (2, 32), (1, 100), (1, 16)] and column[1].shape == (40,)
    with pytest.raises(ValueError, match="lengths end at 50; the longest sequence has 100"):
        text.Ragged([np.arange(100)], lengths=(16, 50))


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "user", "assistant", ":", "a", "b", "c", "d", "!", "Q", "system"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A word-level tokenizer with [CLS] and [SEP] around, which cuts and fills by itself."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(SPECIAL)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.enable_truncation(3)
    made.enable_padding(length=9)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "[CLS]", "eos_token": {"content": "[SEP]"}, "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_a_tokenizer_does_what_it_is_asked_to_and_no_more(folder):
    found = text.Tokenizer(folder)
    assert (found.size, found.fill, found.number("eos_token")) == (len(WORDS), 0, 3)
    assert found.number("pad_token") is None
    plain, longer = found.encode(["a b", "a b c d"])
    assert plain.tokens.tolist() == [2, 7, 8, 3] and len(longer.tokens) == 6
    (pair,) = found.encode(["a b c"], ["d"])
    assert pair.tokens.tolist() == [2, 7, 8, 9, 3, 10, 3]
    assert pair.types.tolist() == [0, 0, 0, 0, 0, 1, 1]
    # Of a pair, the longer one is cut.
    assert found.encode(["a b c"], ["d"], max_length=5)[0].tokens.tolist() == [2, 7, 3, 10, 3]
    assert found.decode([7, 3]) == "a [SEP]"
    with pytest.raises(ValueError, match="max_length is 2; with 2 special tokens it must be at l"):
        found.encode(["a"], max_length=2)
    with pytest.raises(ValueError, match="numbers up to 13, but the model's vocabulary has 5"):
        found.check(5)


def test_what_is_no_tokenizer_is_one_sentence(tmp_path, folder):
    with pytest.raises(ValueError, match="which has no tokenizer.json"):
        text.Tokenizer(tmp_path)
    put(tmp_path, "tokenizer.json", "{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        text.Tokenizer(tmp_path)
    put(tmp_path, "tokenizer.json", (folder / "tokenizer.json").read_text())
    put(tmp_path, "tokenizer_config.json", "[]")
    with pytest.raises(ValueError, match="tokenizer_config.json is no JSON object, but a list"):
        text.Tokenizer(tmp_path)


def test_tables_of_classes(tmp_path, folder):
    tokenizer = text.Tokenizer(folder)
    asked = text.read_texts(put(tmp_path, "a.tsv", "sentence\tlabel\na b c\t0\nd\t1\n"))
    train, test = text.tables(asked, tokenizer, text.Limits(14, 5))
    batch = train[np.arange(2)]
    assert batch["tokens"].tolist() == [[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]]
    assert batch["mask"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch["labels"].dtype == np.int32 and len(test) == 2
    with pytest.raises(
        ValueError, match="line 2: the text has 5 tokens, the model takes 4; give m"
    ):
        text.tables(asked, tokenizer, text.Limits(14, 4))
    cut, _ = text.tables(asked, tokenizer, text.Limits(14, 4, 4))
    assert cut[np.array([0])]["tokens"].tolist() == [[2, 7, 8, 3]]
    with pytest.raises(ValueError, match="max_length is 6; the model takes 5 tokens"):
        text.tables(asked, tokenizer, text.Limits(14, 5, 6))


def asked_for(table, tokenizer):
    """What each row asks for, in words."""
    return [
        tokenizer.decode(row["tokens"][0][row["targets"][0]])
        for row in (table[np.array([i])] for i in range(len(table)))
    ]


def test_without_a_template_the_answer_and_its_end_are_asked(tmp_path, folder):
    tokenizer = text.Tokenizer(folder)
    rows = [
        {"instruction": "a b", "input": "", "output": "c"},
        {"instruction": "a", "input": "b", "output": "c d"},
    ]
    asked = text.read_texts(put(tmp_path, "a.jsonl", lines(*rows)))
    assert asked.kind == "tokens" and asked.columns.texts == ("instruction", "input", "output")
    train, _ = text.tables(asked, tokenizer)
    assert asked_for(train, tokenizer) == ["c [SEP]", "c d [SEP]"]
    assert train[np.array([1])]["tokens"][0, :6].tolist() == [2, 7, 8, 9, 10, 3]
    packed, _ = text.tables(asked, tokenizer, text.Limits(longest=16), packed=True)
    assert packed.segments.max() == 2 and len(packed) == 1
    with pytest.raises(ValueError, match="line 1: no token of an answer is within 3 tokens"):
        text.tables(asked, tokenizer, text.Limits(max_length=3))
    pairs = put(tmp_path, "b.jsonl", lines({"question": "a", "answer": "b"}))
    train, _ = text.tables(text.read_texts(pairs, text=["question", "answer"]), tokenizer)
    assert asked_for(train, tokenizer) == ["b [SEP]"]


def test_plain_texts_are_cut_into_pieces(tmp_path, folder):
    tokenizer = text.Tokenizer(folder)
    asked = text.read_texts(put(tmp_path, "a.txt", "a b c d a b"))
    train, _ = text.tables(asked, tokenizer, text.Limits(longest=3))
    assert len(train) == 3 and train[np.arange(3)]["targets"].sum() == 8
    # Labels are no hindrance where next tokens are asked for.
    rows = put(tmp_path, "b.tsv", "sentence\tlabel\na b\t1\n")
    assert text.read_texts(rows, kind="tokens").columns.kind == "text"


CHAT = """{{ bos_token }}
{%- for m in messages %}
    {{- m.role + ' : ' + m.content + ' ! ' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- 'assistant : ' }}
{%- endif %}
"""
MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} !\
{% endgeneration %}{% else %}{{ m.content }} Q {% endif %}{% endfor %}"""
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b c"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize(("source", "wanted"), [(CHAT, "b c ! d !"), (MARKED, "b c ! d !")])
def test_answers_of_conversations_are_asked_and_nothing_is_put_twice(
    tmp_path, folder, source, wanted
):
    pytest.importorskip("jinja2")
    tokenizer = text.Tokenizer(folder)
    template = text.Template(source, tokenizer.special)
    assert template.marked == (source is MARKED)
    asked = text.read_texts(put(tmp_path, "a.jsonl", lines({"messages": TALK})))
    train, _ = text.tables(asked, tokenizer, template=template)
    assert asked_for(train, tokenizer) == [wanted]
    row = train[np.array([0])]["tokens"][0].tolist()
    assert row.count(2) == (source is CHAT) and row.count(3) == 0
    with pytest.raises(ValueError, match="has conversations, but .* has no chat template"):
        text.tables(asked, tokenizer)
    for bad, message in (
        ([{"role": "user"}], "messages must be a list of objects with a role"),
        (TALK[:1], "line 1: no message has the role 'assistant'"),
    ):
        asked = text.read_texts(put(tmp_path, "b.jsonl", lines({"messages": bad})))
        with pytest.raises(ValueError, match=message):
            text.tables(asked, tokenizer, template=template)


def test_a_template_is_found_where_models_keep_it(tmp_path, folder):
    pytest.importorskip("jinja2")
    put(tmp_path, "tokenizer.json", (folder / "tokenizer.json").read_text())
    tokenizer = text.Tokenizer(tmp_path)
    assert text.chat_template(tmp_path, tokenizer) is None
    several = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    put(tmp_path, "tokenizer_config.json", json.dumps({"chat_template": several}))
    assert text.chat_template(tmp_path).render([]) == "d"
    put(tmp_path, "tokenizer_config.json", json.dumps({"chat_template": several[:1]}))
    with pytest.raises(ValueError, match="has the chat templates tool, none of them named 'def"):
        text.chat_template(tmp_path)
    put(tmp_path, "chat_template.jinja", "file")
    assert text.chat_template(tmp_path).render([]) == "file"


def test_a_template_stays_in_its_sandbox_and_fails_in_a_sentence():
    pytest.importorskip("jinja2")
    assert text.Template("{{ messages | tojson }}").render([{"role": "<é>"}]) == '[{"role": "<é>"}]'
    assert len(text.Template("{{ strftime_now('%Y') }}").render([])) == 4
    for source, message in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
    ):
        with pytest.raises(ValueError, match=f"does not take the messages: .*{message}"):
            text.Template(source).render([])
    with pytest.raises(ValueError, match="the chat template is no Jinja template"):
        text.Template("{% for %}")
    # This one shows only the last message's thoughts, as some do.
    last = text.Template("{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}")
    with pytest.raises(ValueError, match="renders message 2 otherwise when more follow"):
        last.answers(TALK)
