"""The quality of what a model writes: the lists, the measures on odd texts, judging through a real client, the page."""

import re
import sys
from pathlib import Path

import pytest

from poetry_iter.core import UserError, read_jsonl
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.poems import Poem
from poetry_iter.quality import cliches as lists
from poetry_iter.quality.generation import (
    Known,
    brief_kept,
    compare_sets,
    confusion,
    form_asked,
    judge_pairs,
    measure,
    quality_page,
    summary,
)
from poetry_iter.teacher.client import make_teacher
from poetry_iter.workshop.poet_pairs import write_from_briefs

sys.path.insert(0, str(Path(__file__).parent))
from vendor_server import KEY, serve

ROOT = Path(__file__).resolve().parents[1]
BRIEF = "Angle: a man on a ladder.\nAvoid: golden leaves; the heart; a moral.\nImages: gutter, ladder, wet leaves.\nForm: limerick, 5 lines.\nOutput only the poem."
LIMERICK = "A plumber who lived in Peru\nonce swallowed a bottle of glue;\nhe stuck to the floor\nand the handle and door,\nand his wife and the ladder stuck too."


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
    ("Here is your poem. You could replace the second stanza, and consider a rhyme scheme for the poem.", "advice"),
    ("He went up the ladder because the gutter was full and the leaves were wet and nobody else in the house would do it before the rain came again.", "prose"),
    (LIMERICK, ""), ("古池や\n蛙飛び込む\n水の音", ""), ("The reader\nclosed the book.", ""),
])
def test_what_an_output_is(text, what):
    assert confusion(text, BRIEF) == what


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
