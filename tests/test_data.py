"""The annotations and the texts for tests: every row is about poems that ship, passes the gate and quotes what is there."""

import re
from collections import Counter

import pytest

from poetry_iter.core import read_jsonl, root
from poetry_iter.poems import words
from poetry_iter.workshop.gate import gate

ANNOTATED = root() / "data/annotated"
MORE = {"critique": ("more_critiques", 40), "revision_brief": ("more_revision_briefs", 20), "comparison": ("more_comparisons", 23)}


@pytest.fixture(scope="module")
def shipped() -> set[str]:
    rows = [r for name in ("tiny_poems", "bad_poems", "ordinary_poems") for r in read_jsonl(root() / f"data/{name}.jsonl")]
    return {f"{r['title']}\n\n{r['content']}" for r in rows}


@pytest.mark.parametrize("task", MORE)
def test_further_annotations_are_of_poems_that_ship_and_pass_the_gate(task, shipped):
    name, n = MORE[task]
    rows = read_jsonl(ANNOTATED / f"{name}.jsonl")
    assert len(rows) == n == len({(r.get("poem"), r.get("poem_a"), r.get("poem_b")) for r in rows})
    assert {r[k] for r in rows for k in ("poem", "poem_a", "poem_b") if k in r} <= shipped
    assert [(r.get("title"), g) for r in rows if (g := gate(task, r))] == []


def test_a_revision_brief_answers_a_critique_that_ships():
    known = {(r["poem"], r["critique"]) for r in read_jsonl(ANNOTATED / "more_critiques.jsonl")}
    assert sum((r["poem"], r["critique"]) in known for r in read_jsonl(ANNOTATED / "more_revision_briefs.jsonl")) == 20


@pytest.mark.parametrize("name", ["comparisons", "more_comparisons"])
def test_what_a_comparison_quotes_is_there(name):
    for r in read_jsonl(ANNOTATED / f"{name}.jsonl"):
        there = [" ".join(words(r[k])) for k in ("poem_a", "poem_b")]
        assert r["comparison"].endswith(f"Stronger: {r['stronger']}")
        assert [q for q in re.findall(r'"([^"]+)"', r["comparison"]) if not any(" ".join(words(q)) in t for t in there)] == []


def test_the_longer_poem_is_not_the_stronger_one():
    longer = Counter()
    for r in [r for name in ("comparisons", "more_comparisons") for r in read_jsonl(ANNOTATED / f"{name}.jsonl")]:
        a, b = (len(words(r[k])) for k in ("poem_a", "poem_b"))
        longer[0 if a == b else 1 if (a > b) == (r["stronger"] == "A") else -1] += 1
    assert abs(longer[1] - longer[-1]) <= 2


def test_the_texts_for_tests_are_counted():
    formats, adversarial = (read_jsonl(root() / f"tests/data/{name}.jsonl") for name in ("formats", "adversarial"))
    assert set(Counter(r["kind"] for r in formats).values()) == {25} and Counter(r["side"] for r in formats) == {"seen": 100, "unseen": 100}
    assert set(Counter((r["kind"], r["side"]) for r in formats).values()) == {12, 13}
    assert set(Counter((r["measure"], r["expected"]) for r in adversarial).values()) == {10}
    assert all(words(r["text"]) and ("brief" in r) == (r["measure"] == "kept") for r in [*adversarial, *(f | {"measure": ""} for f in formats)])
