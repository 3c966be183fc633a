"""The critic: bad input in one sentence each, a teacher's run that is killed and goes on, a test split that stays shut, and the small reinforcement."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from poetry_iter.core import UserError, read_jsonl, write_text
from poetry_iter.critic.items import grouped, poem_items, read_split, seal, split_items, table_items, write_splits
from poetry_iter.critic.metrics import Judged, metric_set, one_class
from poetry_iter.critic.rationales import Asking, accepted_of, read_verdict, refusal, teach
from poetry_iter.critic.rulebook import fit_rulebook, read_rulebook
from poetry_iter.critic.student import student_rows
from poetry_iter.runs import open_run
from poetry_iter.teacher.client import make_teacher

sys.path.insert(0, os.path.dirname(__file__))
from conftest import kill_all, wait_for
from vendor_server import KEY, serve

HOUSE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shipped():
    return grouped(poem_items("data/tiny_poems.jsonl", 1) + poem_items("data/bad_poems.jsonl", 0) + table_items("data/ordinary_poems.jsonl", "content", "label", ["weak", "good"], "title", "pair"))


@pytest.mark.parametrize(
    "rows, said",
    [
        ("text,label\nA,1\nB,1\n", "one class only: all 2 items are 1"),
        ("text,label\nA,1\nB,good\n", "line 3: a label is 0 or 1, found 'good'"),
        ("text,label\nA,1\n  ,0\n", "line 3: the text is empty"),
        ("text,label\nA,1\nA,0\n", "labelled 0 and 1"),
        ("text,label\n" + "".join(f"word{k} and{k} more{k},{int(k > 1)}\n" for k in range(30)), "class 0 is too small to split: 2 items"),
        ("words,label\nA,1\n", "no column 'text'"),
    ],
)
def test_bad_tables(tmp_path, rows, said):
    with pytest.raises(UserError) as e:
        split_items(grouped(table_items(write_text(tmp_path / "t.csv", rows))))
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, ended, label, why",
    [
        ("<think>Line 1 is flat, as in nothing.</think><label>1</label><label>0</label>", "two_labels", None, "form: more than one label"),
        ("<think>Line 1 is flat, as in nothing.</think>", "no_label", None, "form: no label"),
        ("<think>Line 1 is flat: <label>0</label></think><label>1</label>", "label_inside", 1, "form: a label inside"),
        ("", "empty", None, "form: nothing"),
    ],
)
def test_answers_of_another_form_are_outcomes(text, ended, label, why, shipped):
    v = read_verdict(text)
    assert (v.ended, v.label) == (ended, label)
    assert refusal(v, shipped[0]).startswith(why)


def test_a_rulebook_longer_than_the_context():
    with pytest.raises(UserError, match="the rulebook is longer than the context"):
        fit_rulebook(read_rulebook("data/rulebook"), len, 50)


def test_a_judge_that_calls_everything_alike_is_named_loudly():
    flat = Judged([0, 1, 1], [0.7, 0.7, 0.7])
    assert one_class(flat).startswith("ALL 3 ITEMS WERE CALLED good") and metric_set(flat, 0)["mcc"] is None
    assert "NaN" not in json.dumps(metric_set(flat, 50)) and metric_set(flat, 0)["reasons"]["mcc"] == "everything was called alike"


def test_every_shipped_rationale_is_accepted(shipped, tmp_path):
    rows = teach(shipped, make_teacher("shipped", progress=False), Asking("Is this a good poem?"), tmp_path / "samples.jsonl")
    assert 40 <= len(rows) <= 60 and [r["reject_reason"] for r in rows if not r["accepted"]] == []
    assert len(rows) == len(read_jsonl(HOUSE / "data/annotated/rationales.jsonl"))
    assert min(sum(r["label"] == k for r in rows) for k in (0, 1)) >= 20


def test_the_test_split_stays_shut(shipped, tmp_path):
    run = open_run(tmp_path / "run")
    write_splits(run, split_items(shipped))
    with pytest.raises(UserError, match="stays shut"):
        read_split(run, "test")
    seal(run, {"threshold": 0.5})
    assert read_split(run, "test")
    with pytest.raises(UserError, match="sealed already"):
        seal(run, {"threshold": 0.6})


ASK = """
import sys
from poetry_iter.critic.items import poem_items
from poetry_iter.critic.rationales import Asking, teach
from poetry_iter.teacher.client import make_teacher
items = poem_items(sys.argv[3], 0)[:8]
teacher = make_teacher("anthropic", "claude-haiku-4-5", cap_dollars=5, base_url=sys.argv[1], progress=False)
teach(items, teacher, Asking("Is this a good poem?", tries=3), sys.argv[2])
"""


def answer(body):
    """Wrong at first; right at the second try, when it is asked warmer."""
    said = body["messages"][-1]["content"]
    label = 1 if not body.get("temperature") and "spring is beautiful" not in said else 0
    return f"<think>Line 1 says what any poem on this would say.</think><label>{label}</label>"


def test_a_killed_teacher_goes_on_and_pays_nothing_twice(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "data").symlink_to(HOUSE / "data")
    (tmp_path / ".env").write_text(f"ANTHROPIC_API_KEY={KEY}\n")
    out = tmp_path / "teacher_samples.jsonl"
    with serve(answer) as vendor:
        vendor.delay = 0.3
        command = [sys.executable, "-c", ASK, vendor.url, str(out), str(HOUSE / "data/bad_poems.jsonl")]
        env = {**os.environ, "PYTHONPATH": str(HOUSE), "NO_PROXY": "127.0.0.1"}
        first = subprocess.Popen(command, cwd=tmp_path, env=env)
        for _ in range(600):
            if len(read_jsonl(out, grows=True)) >= 3:
                break
            time.sleep(0.1)
        first.kill()
        first.wait()
        kept = read_jsonl(out, grows=True)
        assert 3 <= len(kept) < 16
        vendor.delay = 0
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
        rows = read_jsonl(out)
        assert rows[: len(kept)] == kept and len({(r["id"], r["try"]) for r in rows}) == len(rows) == 16
        assert vendor.count("messages") <= 17  # the one that was in flight may be asked again, no other
        assert {r["reject_reason"] for r in rows if r["try"] == 1} == {"wrong label"} and len(accepted_of(rows)) == 8


def test_nothing_of_one_class_to_learn_from(shipped):
    with pytest.raises(UserError, match="not one of each class"):
        student_rows(shipped[:3], [], None, None, "reasons")


@pytest.mark.slow
def test_reinforcement_moves_an_adapter_that_opens_again(tmp_path):
    from poetry_iter.critic.reinforcement import reinforce
    from poetry_iter.critic.student import Way
    from poetry_iter.engine import open_engine
    from poetry_iter.training import Training

    lm = open_engine()
    items = poem_items("data/bad_poems.jsonl", 0)[:2] + poem_items("data/tiny_poems.jsonl", 1)[:2]
    checkpoint, log = reinforce(lm, Way("Is this a good poem?"), items, tmp_path / "grpo", Training(), 2, 8, tokens=16)
    assert len(log) == 2 and open_engine(lm.spec.on(tmp_path / "grpo")).identity == lm.identity
    assert reinforce(lm, Way("Is this a good poem?"), items, tmp_path / "grpo", Training(), 2, 8, tokens=16) == (checkpoint, log)


def test_the_rules_programs_take_any_text(shipped):
    from poetry_iter.critic.rulebook import check_rules

    rules = read_rulebook("data/rulebook")
    for text in (*(i.text for i in shipped[::9]), "…\n—\n\nHe did go", "one word", "\n".join(f"and line {k} did go" for k in range(60))):
        assert all(1 <= f["line"] <= len([line for line in text.split("\n") if line.strip()]) for f in check_rules(text, rules, 99))


SMALL = dict(good_poems="", bad_poems="", val_share=0.25, test_share=0.25, epochs=1, eval_steps=1, train_batch_size=4, micro_batch_size=4, lora_rank=4, with_reasons=False, baselines=False)
SIGNS = {"2_teach": "2_teach.running.ipynb", "3_student": "student/step_0001/made_with.json", "4_infer": "inference/student/manifest.json"}


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="two runs of five stages, minutes: SLOW=1 pytest tests/test_critic.py")
def test_a_critic_killed_in_each_stage_is_the_critic_left_alone(house):
    rows = [json.loads(line) for line in (HOUSE / "data/ordinary_poems.jsonl").read_text().splitlines()]
    answered = {json.loads(line)["poem"].partition("\n")[0] for line in (HOUSE / "data/annotated/rationales.jsonl").read_text().splitlines()}
    pairs = sorted({r["pair"] for r in rows if r["title"] in answered})[:8]
    (house.path / "some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["pair"] in pairs))
    arguments = [x for k, v in {**SMALL, "table": house.path / "some.jsonl"}.items() for x in ("-p", f"{k}={v}")]
    one = {"env": {"OMP_NUM_THREADS": "1"}}
    done = house.cli("run", "critic", "--run", "alone", *arguments, **one)
    assert done.returncode == 0, done.stderr
    command = ["run", "critic", "--run", "killed", *arguments]
    for stage, sign in SIGNS.items():
        process = house.start(*command, **one)
        wait_for(house.run("killed") / sign, process)
        kill_all(process)
        assert f"{stage}.ipynb" not in house.notebooks("killed"), f"{stage} was over before the kill"
        command = ["run", "critic", "--resume", "--run", "killed"]
    done = house.cli(*command, **one)
    assert done.returncode == 0, done.stderr
    kinds = ("*.jsonl", "data_splits/*", "metrics_*.json", "seal.json", "inference/*/*.json", "student/*/adapter_model.safetensors")
    files = {run: sorted(str(f.relative_to(house.run(run))) for kind in kinds for f in house.run(run).glob(kind)) for run in ("alone", "killed")}
    assert files["alone"] == files["killed"] and len(files["alone"]) > 20
    assert [n for n in files["alone"] if (house.run("alone") / n).read_bytes() != (house.run("killed") / n).read_bytes()] == []
