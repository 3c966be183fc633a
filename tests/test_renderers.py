"""Text → tokens → mask → text, for any text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from poetry_iter.core import root, shared_data
from poetry_iter.poems import Poem, clean, load_poems
from poetry_iter.renderers import RENDERERS, Completion, Ended, Parsed, get_renderer, quick_tokenizer

MARKERS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|pad|>", "<think>", "</think>", "Title: ", "Poem: ", "Description:", "Output:\n", "\n\n", "␂0␃"]
text = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=12)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(root() / "data/model")


def holds(renderer, description, poem):
    "The contract of an example."
    example, context = renderer.example(description, poem.title, poem.content), renderer.context(description)
    assert example.tokens[: len(context)] == context
    assert example.mask == [0] * len(context) + [1] * (len(example) - len(context))
    assert example.targets[-1] == renderer.end and renderer.end not in example.targets[:-1]
    answer = Completion(renderer.decode(example.targets[:-1]), "stop", example.targets)
    parsed = renderer.parse_poem(answer)
    assert (parsed.value, parsed.ended) == ({"title": poem.title, "content": poem.content}, "complete")
    assert renderer.parse_poem(Completion(answer.text, "length", example.targets[:-1])).ended == "cut"


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(description=text, title=text, content=text)
def test_any_text_comes_back(tokenizer, name, description, title, content):
    title, content = " ".join(clean(title).split()), clean(content)
    if content:
        holds(get_renderer(name, tokenizer), description, Poem(title, content))


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(description=text, thinking=text)
def test_descriptions_come_back(tokenizer, name, description, thinking):
    renderer, poem, description = get_renderer(name, tokenizer), Poem("Ebb", "The boats lie down."), clean(description)  # NFC, as the tokenizer makes it
    example = renderer.describe_example(poem, description, thinking)
    assert example.tokens[: len(renderer.describe(poem))] == renderer.describe(poem)
    assert example.targets[-1] == renderer.end and renderer.end not in example.targets[:-1]
    assert renderer.decode(example.targets[:-1]).strip() == description


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=text, ended=st.sampled_from(["stop", "length"]), special=st.booleans())
def test_any_answer_is_a_value(tokenizer, name, answer, ended, special):
    """Whatever a model says is parsed, and how it ended has a name."""
    renderer = get_renderer(name, tokenizer)
    tokens = tokenizer.encode(answer, add_special_tokens=False) if special else renderer.encode(answer)
    said = Completion(renderer.decode(tokens), ended, [*tokens, renderer.end])
    for parsed in (renderer.parse_poem(said), renderer.parse_description(said)):
        assert isinstance(parsed, Parsed) and isinstance(parsed.ended, Ended) and parsed.ok == (parsed.ended == "complete") and (parsed.value or not parsed.ok)


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(description=text, title=text, content=text)
def test_the_quick_tokenizer_has_the_same_tokens(tokenizer, name, description, title, content):
    quick, context = quick_tokenizer(root() / "data/model")
    slow, fast, poem = get_renderer(name, tokenizer), get_renderer(name, quick), Poem(" ".join(clean(title).split()), clean(content))
    assert context == 2048 and fast.describe(poem) == slow.describe(poem)
    assert fast.example(description, poem.title, poem.content) == slow.example(description, poem.title, poem.content)
    assert fast.longest(poem, 7) <= fast.at_most(poem, 7)


def test_no_quick_tokenizer_of_another_kind(tmp_path):
    """A tokenizer that transformers changes while it loads it is left to transformers."""
    for f in (root() / "data/model").glob("*.j*"):
        (tmp_path / f.name).write_text(f.read_text())
    assert quick_tokenizer(tmp_path)
    for name, old, new in (("tokenizer_config.json", "TokenizersBackend", "LlamaTokenizer"), ("chat_template.jinja", "", "{% generation %}"), ("tokenizer.json", "{", "")):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(whole.replace(old, new, 1) if old else whole + new)
        assert quick_tokenizer(tmp_path) is None, name
        (tmp_path / name).write_text(whole)


@pytest.mark.parametrize("name", RENDERERS)
def test_every_shipped_poem_comes_back(tokenizer, name):
    renderer = get_renderer(name, tokenizer)
    for poem in [p for f in ("tiny", "bad") for p in load_poems(root() / f"data/{f}_poems.jsonl")[0]]:
        holds(renderer, "A few words of it.", poem)


def test_real_poems_come_back(tokenizer):
    path = shared_data("more_poems.jsonl")
    if path is None:
        pytest.skip("../shared/data is not here: 6,060 public-domain poems for tests")
    renderer = get_renderer("chat", tokenizer)
    for poem in load_poems(path)[0][::30]:
        holds(renderer, None, poem)


def test_a_model_may_not_speak_markers(tokenizer):
    "A special token in an answer makes it malformed; the same characters as text do not."
    renderer = get_renderer("chat", tokenizer)
    marker = tokenizer.convert_tokens_to_ids("<|im_start|>")
    spoken = [*renderer.encode("Title: Ebb\nPoem: boats"), marker, renderer.end]
    assert renderer.parse_poem(Completion(renderer.decode(spoken[:-1]), "stop", spoken)).ended == "malformed"


def test_a_template_without_a_system_role(tokenizer):
    "Some templates raise on a system message: it moves into the first user message."
    from copy import deepcopy

    t = deepcopy(tokenizer)
    t.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = get_renderer("chat", t)
    assert "You are a poet.\n\nDescription: ebb" in renderer.decode(renderer.context("ebb"))
    holds(renderer, "ebb", Poem("Ebb", "boats"))
