"""The judge that ships: what it says, how it fails, how fast it is, and that the poems to judge have no shortcut that was looked for."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from poetry_iter.core import UserError, read_jsonl, root, shared_data
from poetry_iter.critic.baselines import BASELINES, out_of_fold_baseline, predict_baseline
from poetry_iter.critic.choice import TASK, find_judge
from poetry_iter.critic.features import MEANING, figures, hear, level_words, places
from poetry_iter.critic.judgement import JUDGE_FILE, Judge, bent, choose_draft, open_judge, p_good
from poetry_iter.critic.metrics import Judged, metric_set
from poetry_iter.pipeline.command_line import main

ORDINARY = read_jsonl(root() / "data/ordinary_poems.jsonl")
BAD = """O grand and noble building, we thee greet,
That now doth stand in Market Street!
The Mayor did come at half past ten,
With many other worthy men,
And he did make a speech sublime,
Which lasted for a goodly time,
And all the people, great and small,
Did much admire so fair a hall."""
GOOD = """The lamp burns low; the hearth is gray with ash;
Rain on the slates, and wind along the wall,
And where the elm boughs lean against the sash
I hear the last of the brown apples fall.

I had a letter once, on such a night,
The ink run blue and soft along the fold;
I never held it nearer to the light,
And have it still, unread, and I am old."""


def test_good_and_bad():
    bad, good = (open_judge().judge(t) for t in (BAD, GOOD))
    assert (bad.label, good.label, bad.unsure, good.unsure) == ("bad", "good", False, False)
    assert bad.p_good < 0.1 and good.p_good > 0.9
    assert any("did" in str(r) and r.weight < 0 for r in bad.reasons) and any(r.weight > 0 and r.lines for r in good.reasons)


def test_reasons_cite_what_stands_there():
    for text in (BAD, GOOD, *(r["content"] for r in ORDINARY[:10])):
        reading = hear(text)
        for reason in open_judge().judge(text).reasons:
            assert not reason.quote or reason.quote in reading.lines
            for n, said in reason.lines:
                assert set(said.replace(" / ", " ").split()) & set(reading.words[n - 1])


@pytest.mark.parametrize(
    ("change", "within"),
    [(str.upper, 0.0), (lambda t: "\n".join("   " * (k % 2) + x for k, x in enumerate(t.split("\n"))), 0.0), (lambda t: t.replace("'", "’"), 0.0), (lambda t: t.replace("\n\n", "\n"), 0.5), (lambda t: "".join(c for c in t if c.isalnum() or c in " \n'"), 0.5)],
    ids=["capitals", "indentation", "quotes", "stanzas", "punctuation"],
)
def test_layout_and_spelling_tell_nothing(change, within):
    judge = open_judge()
    for text in (BAD, GOOD):
        assert abs(judge.score(hear(text)) - judge.score(hear(change(text)))) <= within + 1e-9


@pytest.mark.parametrize(
    "text", ["a", "...\n!!", "1 2 3\n4 5 6", "二月の雪\n" * 8, "شب سیاه\n" * 8, "😀 😀\n" * 6, "He went into the shop and bought some bread. " * 40, "Je ne sais pas pourquoi la lune\nregarde encore le jardin\net verse au fond de la lagune\nson lait de neige et de satin\n" * 2, "\x00\x1b[31mred\n" * 9]
)
def test_what_it_cannot_judge_is_unsure(text):
    verdict = open_judge().judge(text)
    assert verdict.unsure and verdict.doubt and 0.3 < verdict.p_good < 0.7
    assert p_good(text) is None


def test_modern_poems_are_unsure():
    """All it knows of modern verse are these: that it recognises them says that the guard works, not how far it reaches."""
    verdicts = [open_judge().judge(r["content"], reasons=False) for r in ORDINARY[::4]]
    assert np.mean([v.unsure for v in verdicts]) > 0.9


def test_figures_have_names_and_places():
    found = figures(hear(BAD))
    assert set(found) == set(MEANING) and all(map(math.isfinite, found.values()))
    assert [n for n, _ in places(hear(BAD), "diction_did")] == [2, 3, 5]
    assert level_words("O'er the honour'd flow'r") == level_words("over the honored flower")


def test_the_curve_never_falls():
    judge = open_judge()
    p = [judge.chance(s) for s in np.linspace(-40, 40, 400)]
    assert np.all(np.diff(p) >= 0) and 0 < p[0] < 0.01 and 0.99 < p[-1] < 1
    assert bent(np.zeros(3)).shape == (3, 2)


def test_a_judge_is_numbers_and_single_words(tmp_path):
    with np.load(JUDGE_FILE, allow_pickle=False) as z:
        assert {z[k].dtype.kind for k in z.files} <= {"f", "U"}
        assert all(" " not in w and len(w) < 40 for k in ("words", "figures", "time_words") for w in str(z[k]).split(" "))
    (tmp_path / "judge.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="no judge in it"):
        Judge(tmp_path / "judge.npz")


def test_drafts():
    assert choose_draft([BAD, GOOD]) == 1 and choose_draft([GOOD, BAD]) == 0 and choose_draft(["one", "two"]) == 0
    with pytest.raises(UserError, match="no draft"):
        choose_draft([])


def test_the_command(tmp_path, capsys):
    rows = [{"title": "Hall", "content": BAD, "author": "A"}, {"title": "Letter\x1b[31m", "content": GOOD}, {"title": "", "content": "x"}]
    (file := tmp_path / "poems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["judge", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    told = [json.loads(x) for x in out.splitlines()]
    assert err.startswith("judged by ") and err.count("\n") == 1
    assert [r["label"] for r in told] == ["bad", "good", None] and all(list(r) == ["title", "author", "label", "p_good", "unsure", "reasons"] for r in told)
    assert "\x1b" not in told[1]["title"] and told[0]["reasons"] and "left out" in told[2]["reasons"][0]
    assert main(["judge", str(file), "--label-only"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["Hall (A)", f"bad, P(good) {told[0]['p_good']:.2f}"]
    (empty := tmp_path / "empty.txt").write_text("")
    assert main(["judge", str(empty)]) == 2 and "no poem" in capsys.readouterr().err
    assert main(["judge", str(tmp_path / "none.txt")]) == 2


def test_a_student_judges_when_it_has_earned_it(tmp_path, monkeypatch):
    """By what its run has sealed; not before it beats both, and not when it was taught another question."""
    from poetry_iter.core import write_json
    from poetry_iter.critic.items import grouped, seal, split_items, table_items, write_splits
    from poetry_iter.runs import open_run

    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "data").symlink_to(root() / "data")
    monkeypatch.chdir(tmp_path)
    run = open_run(tmp_path / "outputs/taught")
    write_splits(run, split_items(grouped(table_items("data/ordinary_poems.jsonl", "content", "label", ["weak", "good"], "title", "pair"))))
    seal(run, {"step": 0, "where": "", "weights": "", "mode": "label", "threshold": 0.0, "unsure": [0.0, 0.0], "reason_tokens": 8, "task": TASK, "way": {"task": TASK}, "model": {"name": "data/model"}})
    for beats, who in ((False, "the judge that ships"), (True, "the student of run taught")):
        write_json(tmp_path / "outputs/model/latest.json", {"best": "../taught/", "best_run": "taught", "beats_shipped": beats})
        assert find_judge().why.startswith(f"judged by {who}")
    judge = find_judge().open()
    verdict, long = judge.judge(GOOD, reasons=False, title="Letter"), judge.judge(GOOD * 60)
    assert (verdict.label, verdict.unsure, verdict.doubt) == ("good", False, "") and 0 < verdict.p_good < 1
    assert long.unsure and "longer than the student can read" in long.doubt
    assert judge.judge(GOOD, title="Letter").p_good == verdict.p_good


def test_neither_torch_nor_scikit_learn_and_fast():
    code = "import sys; from poetry_iter.critic.judgement import open_judge; open_judge().judge('a line of verse\\n' * 6); print(sorted({'torch', 'sklearn', 'pandas', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    open_judge().judge(GOOD)
    start = time.process_time()
    for r in ORDINARY[:20]:
        open_judge().judge(r["content"])
    assert (time.process_time() - start) / 20 < 0.12


@pytest.mark.parametrize("name", ["words (TF-IDF)", "shape"])
def test_ordinary_pairs_have_no_shortcut_that_was_looked_for(name):
    """These poems were edited until the intervals of TF-IDF and of shape held .5 (data/README.md): this keeps what was aimed at, and is no evidence of difficulty."""
    p = out_of_fold_baseline(name, [r["content"] for r in ORDINARY], y := [int(r["label"] == "good") for r in ORDINARY], groups := [r["pair"] for r in ORDINARY], shuffles=2)
    found = metric_set(Judged(y, p.tolist(), groups=groups), 500)
    assert found["auroc_lo"] <= 0.5 <= found["auroc_hi"], found["auroc"]


def test_baselines_say_what_is_wrong():
    with pytest.raises(UserError, match="both classes"):
        predict_baseline("shape", ["a", "b"], [0, 0], ["c"])
    with pytest.raises(UserError, match=r"there are words \(TF-IDF\)"):
        predict_baseline("tfidf", ["a", "b"], [0, 1], ["c"])
    assert all(len(read(["", "one\ntwo"])) == 2 for read, _ in BASELINES.values())


@pytest.mark.skipif(not shared_data("bad_poems.jsonl"), reason="needs ../shared/data")
def test_on_what_it_learned_from():
    """In sample: a guard against weights and figures that no longer fit together. The honest figure is in nbs/log.md."""
    rows = [(r["content"], 0) for r in read_jsonl(shared_data("bad_poems.jsonl"))[::6]] + [(r["content"], 1) for r in read_jsonl(shared_data("tiny_poems.jsonl"))[::4]]
    found = metric_set(Judged([y for _, y in rows], [open_judge().judge(t, reasons=False).p_good for t, _ in rows]), 0)
    assert found["auroc"] > 0.95
