"""The quality of what a model writes: the lists, the measures on odd texts, judging through a real client, the page."""

import re
import sys
from pathlib import Path

import pytest

from poetry_iter.core import UserError, read_jsonl
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.poems import Poem
from poetry_iter.quality import cliches as lists
from poetry_iter.quality.fluency import fluency, shuffled_words
from poetry_iter.quality.generation import (
    CONFUSIONS,
    Known,
    brief_kept,
    compare_sets,
    confusion,
    doubts,
    form_asked,
    judge_pairs,
    measure,
    quality_page,
    summary,
)
from poetry_iter.quality.kinds import TEXT_KINDS, kind_odds
from poetry_iter.quality.making.separation import auroc_of, matched_poems
from poetry_iter.teacher.client import make_teacher
from poetry_iter.workshop.poet_pairs import write_from_briefs

sys.path.insert(0, str(Path(__file__).parent))
from vendor_server import KEY, serve

ROOT = Path(__file__).resolve().parents[1]
BRIEF = "Angle: a man on a ladder.\nAvoid: golden leaves; the heart; a moral.\nImages: gutter, ladder, wet leaves.\nForm: limerick, 5 lines.\nOutput only the poem."
LIMERICK = "A plumber who lived in Peru\nonce swallowed a bottle of glue;\nhe stuck to the floor\nand the handle and door,\nand his wife and the ladder stuck too."


@pytest.fixture(scope="module")
def embedded():
    return open_engine(ModelSpec())


def test_every_entry_of_the_list_finds_itself():
    topics = lists.read_cliches()
    assert len(topics) >= 20 and all(len(group) >= 20 for group in topics.values())
    for topic, group in topics.items():
        assert len({c.phrase for c in group}) == len(group), topic
        for c, said in zip(sorted(group, key=lambda c: lists.seed_of(0, c.phrase)), lists.cliches_of(topic, len(group))):
            assert c.pattern.search(said + " "), c
            assert lists.cliches(said, [topic]), c


def test_a_broken_list_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sea:\n  songs: [ebb and flow]\n")
    with pytest.raises(UserError, match=r"mine\.yaml, topic sea: expected phrases, images, moves, endings, found songs"):
        lists.cliches("x", path=str(path))


def test_clichés_across_a_line_break_and_endings_only_at_the_end():
    assert [c["line"] for c in lists.cliches("a blaze\nof glory, it was\na Tuesday\nand wet")] == [1]
    text = "The circle of life\n" + "a cup\n" * 3
    assert lists.cliches(text) == [] and lists.cliches("a cup\n" * 3 + "the circle of life")


@pytest.mark.parametrize("text, what", [
    ("", "empty"), ("  \n ", "empty"), ("…", "empty"),
    (BRIEF, "brief"), ("**Angle:** a\n**Form:** b", "brief"),
    ("What works: the ladder.\n\nIssues:\n- Cliché, line 3: cut it.", "advice"),
    ("You could replace the second stanza, and consider a rhyme scheme for the poem. The poem needs imagery.", "advice"),
    ("He went up the ladder because the gutter was full and the leaves were wet and nobody else in the house would do it before the rain came again.", "prose"),
    (LIMERICK, ""), ("古池や\n蛙飛び込む\n水の音", ""), ("The reader\nclosed the book.", ""),
])
def test_what_an_output_is(text, what):
    assert confusion(text, BRIEF) == what


@pytest.mark.parametrize("side", ["seen", "unseen"])
def test_verse_is_told_from_what_is_none(side):
    texts = [r for r in read_jsonl(ROOT / "tests/data/formats.jsonl") if r["side"] == side]
    said = [confusion(r["text"]) for r in texts]
    assert set(said) <= {"", *CONFUSIONS}
    right = sum((what == "") == (r["kind"] == "verse") for what, r in zip(said, texts))
    assert right >= 95, f"{right} of {len(texts)} {side} texts"


def test_poems_that_ship_are_verse():
    poems = [r["content"] for name in ("tiny", "bad", "ordinary") for r in read_jsonl(ROOT / f"data/{name}_poems.jsonl")[::2]]
    assert sum(not confusion(p) for p in poems) >= 0.98 * len(poems)


@pytest.mark.parametrize("text", ["x", "...", "1", "\t\n \n", "a\r\nb\r\n", "—\n—", "Ж\nЖ", "{", "word " * 3000])
def test_odd_texts_have_odds(text):
    odds = kind_odds(text)
    assert odds == {} or (tuple(odds) == TEXT_KINDS and sum(odds.values()) == pytest.approx(1))


def auc(high, low): return sum((h > x) + (h == x) / 2 for h in high for x in low) / (len(high) * len(low))


def adversarial(name, of, every=slice(None, None, 2)):
    rows = [r for r in read_jsonl(ROOT / "tests/data/adversarial.jsonl") if r["measure"] == name]
    return auc(*([of(r) for r in [r for r in rows if r["expected"] == side][every]] for side in ("high", "low")))


def test_measures_on_the_half_of_the_texts_that_they_were_made_on():
    assert adversarial("cliches", lambda r: len(lists.cliches(r["text"]))) >= 0.8
    assert adversarial("concrete", lambda r: lists.concrete_share(r["text"])) >= 0.8
    assert adversarial("kept", lambda r: brief_kept(r["text"], r["brief"])["kept"] or 0) >= 0.8
    poems = [Poem(r["title"], r["content"]) for r in read_jsonl(ROOT / "data/tiny_poems.jsonl")]
    assert adversarial("memorised", lambda r, known=Known(poems): known.nearest(r["text"])["quatrain"], slice(None)) == 1


@pytest.mark.parametrize("text, n", [
    ("her heart, which had behaved, skipped\njust one beat", 1), ("there are a hundred butterflies\nin my stomach", 1), ("my stomach was all butterflies", 1), ("time is healing every wound", 1),
    ("He weighed the broken heart with the kidneys and the liver.", 0), ("She cut the iceberg's tip off, rinsed the lettuce.", 0), ("Behind the bus the crossroads, and the driver", 0)])
def test_idioms_are_found_however_bent_and_plain_things_are_not(text, n):
    assert len(lists.cliches(text)) == n, lists.cliches(text)


def test_a_heap_of_things_is_not_concrete_and_keeps_no_brief():
    heap = "gutter ladder leaves\nbucket rope hammer glove"
    assert lists.concrete_share(heap) == 0 and lists.concrete_share("He leans the ladder on the gutter\nand fills the bucket with wet leaves") == 1
    kept = brief_kept(heap, BRIEF)
    assert kept["images"] == 0 and kept["forbidden_kept"] == 0 and kept["kept"] == 0
    assert brief_kept("He hung a terrier's leash\non the nail by the stove", "Images: a dog, a lead.")["images"] == 1
    assert brief_kept("She had been weeping when\nhe sobbed at the gate", "Avoid: tears.")["forbidden_kept"] == 0


def test_order_is_worth_more_than_any_other(embedded):
    poems = [r["content"] for r in read_jsonl(ROOT / "data/tiny_poems.jsonl")[:4]]
    own, mixed = fluency(poems, embedded, 2), fluency([shuffled_words(p, 5) for p in poems], embedded, 2)
    assert sum(own) > sum(mixed) + 0.2 and fluency([""], embedded) == [None]
    rows = measure([{"brief": "", "text": p, "ended": "complete"} for p in poems[:1]], lm=embedded)
    assert rows[0]["fluency"] > 0


def test_what_does_not_separate_is_said():
    pairs = matched_poems([{"content": "a b c " * k, "author": "A Bad", "title": ""} for k in (2, 9)], [{"content": "x y z " * k, "author": f"A {k}", "title": "", "license": "died 1900"} for k in range(1, 12)])
    assert all(len(b["content"]) == len(g["content"]) for b, g in pairs)
    assert auroc_of([1, 2] * 9, [2, 1] * 9)["separates"] is False and auroc_of([0] * 9, [1] * 9)["auroc"] == 1
    assert "Does not separate" in doubts()


def test_a_brief_is_checked_part_by_part():
    kept = brief_kept(LIMERICK, BRIEF)
    assert kept["form"] == "limerick" and kept["form_kept"] == 1 and kept["forbidden_kept"] == 1
    assert kept["images"] == pytest.approx(1 / 3) and kept["rhyme"] > 0.8
    assert brief_kept("golden\nleaves, and the heart", BRIEF)["forbidden_kept"] == pytest.approx(1 / 3)
    assert brief_kept(LIMERICK, BRIEF.replace("limerick, 5", "villanelle, 19"))["form_kept"] == 0
    assert form_asked("Form: whatever comes") == ""


def test_recited_lines_are_found_and_others_not():
    poems = [Poem("Glue", LIMERICK), Poem("Other", "A cat\non the mat\nin a hat\nsat")]
    near = Known(poems).nearest(LIMERICK.replace("plumber", "drummer"))
    assert (near["title"], near["memorised"], near["run"] > 10) == ("Glue", True, True)
    near = Known(poems).nearest("Snow\nfell on the yard\nall night")
    assert (near["title"], near["run"], near["memorised"]) == ("", 0, False)


@pytest.mark.parametrize("text", ["", "a", "\n\n\n", "🙂 🙂", "word " * 5000, "x\n" * 2000, "\x00\x1b[0m", "Title\n\n"])
def test_odd_texts_are_measured(text):
    [row] = measure([{"brief": BRIEF, "text": text, "ended": "cut"}], [Poem("Glue", LIMERICK)])
    assert row["stops"] == 0 and set(summary([row])) >= {"verse", "cliches", "distinct_1"}


def test_a_difference_that_is_there_is_seen_and_none_where_there_is_none():
    plain = measure([{"brief": BRIEF, "text": f"{LIMERICK}\n{i} gutters", "ended": "complete"} for i in range(12)])
    worn = measure([{"brief": BRIEF, "text": f"The golden leaves\nwere like a blaze of glory\nand {i} hearts of gold", "ended": "complete"} for i in range(12)])
    table = compare_sets({"plain": plain, "worn": worn})
    assert table["lo"]["cliches"] > 0 > table["hi"]["forbidden_kept"]
    assert (compare_sets({"plain": plain, "again": plain})[["lo", "hi"]].dropna() == 0).all().all()


def test_judging_in_both_orders_by_a_vendor(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    rows = lambda text: [{"brief": BRIEF, "text": f"{text} {i}"} for i in range(4)]
    with serve() as vendor:  # it always says A, the first that the schema allows
        teacher = make_teacher("anthropic", "claude-haiku-4-5", cap_dollars=1, base_url=vendor.url, progress=False)
        out, verdict = judge_pairs(teacher, rows("worn"), rows("plain"))
        assert (vendor.count("messages"), verdict["agreement"], verdict["wins"]["mean"]) == (8, 0.0, 0.5)
        vendor.faults.append("refusal")
        out, verdict = judge_pairs(teacher, rows("worn")[:1], rows("odd")[:1])
        assert verdict["unjudged"] == 1 and verdict["wins"]["mean"] is None and "refusal" in out[0]["reasons"]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    rows = [{"brief": BRIEF, "request": "", "text": t, "ended": "complete"} for t in (LIMERICK, BRIEF, "The golden leaves\nof autumn <script>alert(1)</script>\nfell", "")]
    page = quality_page(tmp_path / "quality.html", {"base": measure(rows), "trained": measure(rows, [Poem("Glue", LIMERICK)])}, human=measure(rows[:1])).read_text()
    assert "<script" not in page and "src='http" not in page and not re.search("href='(?!#)", page)
    assert "Nearest to a training poem" in page and "No poems" in page and "golden leaves" in page


def test_the_embedded_model_is_measured(tmp_path, monkeypatch):
    model = ROOT / "data/model"
    if not (model / "model.safetensors").exists():
        pytest.skip("the embedded model is not there")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.chdir(tmp_path)
    briefs = [{"brief": r["brief"], "request": r["user_request"]} for r in read_jsonl(ROOT / "data/annotated/briefs.jsonl")[:3]]
    written = write_from_briefs(open_engine(ModelSpec(name=str(model))), briefs, Sampling(0.8, max_new_tokens=60))
    rows = [{**b, "text": w["text"], "ended": w["ended"]} for b, w in zip(briefs, written)]
    assert [w["brief"] for w in written] == [b["brief"] for b in briefs] and {r["ended"] for r in rows} <= {"complete", "cut", "malformed"}
    figures = summary(measure(rows))
    assert figures["verse"]["n"] == 3 and 0 <= figures["verse"]["lo"] <= figures["verse"]["hi"] <= 1
