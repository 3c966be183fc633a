"""The workshop: its contracts, its data, a whole run on the model that ships, and the command that writes a poem."""

import json
import os
from collections import Counter

import pytest

from poetry_iter.core import UserError, read_jsonl, root, shared_data, write_jsonl
from poetry_iter.engine import ModelSpec
from poetry_iter.pipeline.experiments import get_experiment, stage_order
from poetry_iter.poems import Poem, families, load_poems
from poetry_iter.workshop.gate import FILES, gate, good_and_bad, load_annotations
from poetry_iter.workshop.mix import divide, mix, sides, training_rows
from poetry_iter.workshop.questions import match_poems
from poetry_iter.workshop.session import Crew, players_of, prompt_differences, session
from poetry_iter.workshop.tasks import TASKS, contract_differences, poem_text, read_poem

# A change of words needs a new version: change both here, in one commit with the words.
SNAPSHOT = {
    "critique": "critique-1-e501f67b",
    "comparison": "comparison-1-4a00e00e",
    "revision_brief": "revision_brief-1-c8dff87f",
    "brief": "brief-1-b19e5f15",
    "autopsy": "autopsy-1-4ca5a7c7",
    "lesson": "lesson-1-5b589d18",
    "note": "note-1-ced9456d",
    "reading": "reading-1-8c82e283",
    "poem": "poem-1-433f3215",
}
QUICK = [
    "limit_good=2",
    "limit_bad=4",
    "limit=4",
    "limit_pairs=6",
    "written_poems=1",
    "poem_tokens=24",
    "revisions=1",
    "answer_tokens=24",
    "lora_rank=4",
]


def quick(*more: str) -> list[str]:
    return [x for s in (*QUICK, *more) for x in ("-p", s)]


def test_the_contracts_are_those_of_the_snapshot():
    assert {name: t.contract for name, t in TASKS.items()} == SNAPSHOT


def test_no_two_tasks_ask_in_the_same_words():
    row = dict.fromkeys(("poem", "poem_a", "poem_b", "critique", "user_request", "question", "brief"), "x")
    prompts = Counter(json.dumps(t.messages(row)) for t in TASKS.values())
    assert max(prompts.values()) == 1


def test_a_difference_of_contracts_is_seen(tmp_path):
    (tmp_path / "made_with.json").write_text('{"contracts": {"critique": "critique-0-old", "poem": "' + TASKS["poem"].contract + '"}}')
    assert prompt_differences(ModelSpec(adapter=str(tmp_path))) == [f"critique: trained with critique-0-old, used with {TASKS['critique'].contract}"]
    assert contract_differences({"a task of old": "x"}) == []


def test_every_answer_that_ships_passes_the_gate():
    answers = load_annotations("data/annotated")
    assert [(t, r.get("title"), g) for t, rows in answers.items() for r in rows if (g := gate(t, r))] == []
    assert all(TASKS[t].conversation(r)[-1]["content"] for t, rows in answers.items() for r in rows)


@pytest.mark.parametrize(
    "broken",
    [
        "What works: x",
        "Issues:\n- a",
        "What works: x\n\nIssues:\nNone.",
        "What works: x\n\nIssues:\n- Cliché, line 1: mend it now.\n\nThis poem is done.",
    ],
)
def test_only_a_whole_critique_is_one(broken):
    with pytest.raises(ValueError):
        TASKS["critique"].parse(broken)


def near_duplicates() -> tuple[list[Poem], list[Poem]]:
    """Good and bad poems that ship, with a near-duplicate of every third."""
    good, bad, _ = good_and_bad("data/tiny_poems.jsonl", "data/bad_poems.jsonl")
    twin = lambda p: Poem(p.title + " again", p.content + "\none line more than before", extra=p.extra)
    return good + [twin(p) for p in good[::3]], bad + [twin(p) for p in bad[::3]]


@pytest.mark.parametrize("seed", range(4))
def test_no_poem_nor_its_near_duplicate_is_on_both_sides(seed):
    good, bad = near_duplicates()
    ids = {p.id for p in bad}
    rows = training_rows("autopsy", [{"poem": poem_text(p), "autopsy": "x"} for p in bad], ids)
    rows += training_rows("comparison", [{**m, "comparison": "x"} for m in match_poems(bad, good, seed)], ids)
    rows += training_rows("poem", [{"poem": poem_text(p), "brief": "x"} for p in good], ids)
    train, valid = divide(rows, sides(rows, 0.2, seed))
    family = dict(zip((p.id for p in [*good, *bad]), families([*good, *bad])))
    on = [{family[i] for r in part for i in r["poems"]} for part in (train, valid)]
    assert on[0] and on[1] and not on[0] & on[1]


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5])
def test_the_mix_is_exact_or_says_why(share):
    answers = load_annotations("data/annotated")
    _, bad, _ = good_and_bad("data/tiny_poems.jsonl", "data/bad_poems.jsonl")
    ids = {p.id for p in bad}
    rows = [r for task, found in answers.items() for r in training_rows(task, found, ids)]
    mixed, found = mix(rows, share)
    tasks = {i: {r["task"] for r in mixed if i in r["poems"]} for i in ids}
    assert found["exact"] == (sum(r["bad"] for r in mixed) == share * len(mixed)) and found["exact"] != bool(found["reason"])
    assert min(map(len, tasks.values())) >= 3
    assert max(Counter(id(r) for r in mixed).values()) <= 2


def test_pairs_are_alike_and_balanced_on_real_poems():
    if not shared_data("bad_poems.jsonl"):
        pytest.skip("../shared/data is not here")
    bad, good = load_poems(shared_data("bad_poems.jsonl"))[0], load_poems(shared_data("more_poems.jsonl"))[0][:600]
    pairs = match_poems(bad, good, 3)
    first = sum(p["good_at"] == "A" for p in pairs)
    used = {read_poem(p["poem_b" if p["good_at"] == "A" else "poem_a"]).id for p in pairs}
    lines = [abs(len(read_poem(p["poem_a"]).lines) - len(read_poem(p["poem_b"]).lines)) for p in pairs]
    assert len(pairs) == len(bad) == len(used) and abs(2 * first - len(pairs)) <= 1
    assert sorted(lines)[len(lines) // 2] <= 8, "half of the pairs differ by a stanza at the most"


def test_stages_that_flags_leave_out():
    experiment = get_experiment("workshop")
    names = lambda **flags: [name[0] for _, name in stage_order(experiment, flags)]
    assert names() == list("12345678")
    assert names(educator_only=True) == list("123568")
    assert names(poet_only=True) == list("34578")
    assert names(skip_generation=True) == list("5678")
    assert names(export="Q4_K_M") == list("123456789")


whole_run = pytest.mark.skipif(not os.environ.get("SLOW"), reason="eight stages with training, many minutes: SLOW=1 pytest tests/test_workshop.py")


@whole_run
def test_a_whole_run_and_a_poem_from_it(house):
    done = house.cli("run", "workshop", "--profile", "first-test", "--run", "w", *quick("requests=['a poem about a lock']", "forms=['haiku']"))
    assert done.returncode == 0, done.stderr
    run = house.run("w")
    assert "Session: a poem about a lock" in (run / "report.html").read_text()
    assert [c["name"] for c in read_jsonl(run / "checkpoints.jsonl")] == ["interim_educator", "educator", "poet"]
    train, valid = ([r for who in ("educator", "poet") for r in read_jsonl(run / f"{who}_training" / f"{side}.jsonl")] for side in ("train", "valid"))
    assert not {i for r in train for i in r["poems"]} & {i for r in valid for i in r["poems"]}
    assert all(r["contract"] == TASKS[r["task"]].contract and r["provider"] == "shipped" for r in train)
    assert {m["role"] for r in train for m in r["messages"]} == {"system", "user", "assistant"}
    found = json.loads((run / "sessions" / "1.json").read_text())
    assert {"final_poem", "educator_note", "generation_brief", "revision_history", "metadata"} == found.keys()
    assert not found["revision_history"] or (
        found["final_poem"] == found["revision_history"][-1]["draft"] and found["revision_history"][-1]["critique"] is not None
    )
    assert house.metrics("w")[0, "missing"] == 0

    before = (run / "report.html").stat().st_mtime_ns
    assert house.cli("run", "workshop", "--resume", "--run", "w").returncode == 0
    assert (run / "report.html").stat().st_mtime_ns == before, "a run that is complete is left alone"

    written = house.cli(
        "write", "a poem about winter light", "--run", "w", "--form", "haiku", "--revisions", "0", "--tokens", "24", "--out", "outputs/poem.json"
    )
    assert written.returncode == 0, written.stderr
    record = json.loads((house.path / "outputs/poem.json").read_text())
    assert written.stdout.strip() == record["final_poem"] and "── critique 1" in written.stderr
    assert record["metadata"]["models"]["poet"]["adapter"].endswith("w/poet") and record["metadata"]["models"]["poet"]["differences"] == []


@whole_run
def test_the_educator_alone_from_answers_in_a_folder(house, tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    for task in ("critique", "autopsy", "brief"):
        write_jsonl(folder / FILES[task], load_annotations("data/annotated", (task,))[task][:6])
    settings = quick(
        "skip_generation=true",
        "educator_only=true",
        f"annotations={folder}",
        "requests=['x']",
        "forms=['']",
        "revisions=0",
        "min_samples=0",
        "educator_epochs=1",
    )
    done = house.cli("run", "workshop", "--run", "e", *settings)
    assert done.returncode == 0, done.stderr
    assert house.notebooks("e") == ["5_prepare.ipynb", "6_educator.ipynb", "8_session.ipynb"]


BAD_INPUT = {
    "a poem in both files": (["-p", "bad_poems=data/tiny_poems.jsonl"], "a poem is good or bad"),
    "an empty folder": (["-p", "bad_poems={tmp}"], "no .jsonl, .json, .txt, .csv"),
    "no key": (["-p", "hard_provider=anthropic", "-p", "cap_dollars=1"], "ANTHROPIC_API_KEY"),
    "no cap": (["-p", "hard_provider=anthropic"], "cap"),
    "an unknown provider": (["-p", "hard_provider=oracle"], "expected one of shipped"),
    "poems that no shipped answer knows": (["-p", "bad_poems={one}"], "name a provider that can write them"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_a_sentence(house, tmp_path, case):
    settings, told = BAD_INPUT[case]
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "one.jsonl", [{"title": "Unknown", "content": "A poem that nobody\nhas criticised"}])
    settings = [s.format(tmp=tmp_path / "empty", one=tmp_path / "one.jsonl") for s in settings]
    done = house.cli("run", "workshop", "--run", "b", *settings, env={"ANTHROPIC_API_KEY": "sk-nobody" if case == "no cap" else "", "HOME": str(tmp_path)})
    assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_a_dry_run_shows_prompts_and_price_and_leaves_nothing(house):
    done = house.cli("run", "workshop", "--dry-run", "-p", "hard_provider=anthropic", "-p", "cap_dollars=1", "-p", "limit_bad=2", "-p", "limit_good=1")
    assert done.returncode == 0, done.stderr
    for told in ("5 requests, about $0.1", "=== critique", "=== comparison", "The last line is", "at the most $"):
        assert told in done.stdout
    assert not list((house.path / "outputs").glob("*"))
    assert "leaves no run behind" in house.cli("run", "workshop", "--dry-run", "--run", "x").stderr


def test_a_row_that_was_cut_in_half(tmp_path):
    (tmp_path / FILES["lesson"]).write_text('{"question": "a", "lesson": "b"}\n{"question": "c", "les')
    with pytest.raises(UserError, match="line 2: not a whole JSON object"):
        load_annotations(tmp_path)
    (tmp_path / FILES["lesson"]).write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match="line 1: no text under lesson; it has question, answer"):
        load_annotations(tmp_path)


def test_write_refuses_what_it_cannot_do(house):
    for args, told in (
        ([" "], "say what the poem is to be about"),
        (["a poem", "--form", "sonet"], "no form is called"),
        (["a poem", "--run", "nobody"], "there is no folder"),
        (["a poem", "--model", "x.gguf"], "there is no such file"),
    ):
        done = house.cli("write", *args)
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr


def test_one_model_at_a_time_gives_the_same_session():
    def run(swap):
        crew = Crew(ModelSpec(), ModelSpec(name=str(root() / "data/model")), swap)
        return session(crew, "a poem about a lock", "", 1, tries=1, tokens=12), crew

    (one, swapping), (two, keeping) = run(True), run(False)
    assert one["revision_history"] == two["revision_history"] and one["final_poem"] == two["final_poem"]
    assert len(swapping.loaded) == 1 and len(keeping.loaded) == 2 and swapping.loads > keeping.loads == 2


def test_players_come_from_a_run_or_a_model():
    assert players_of(model="data/model")[0] == ModelSpec()
    with pytest.raises(UserError, match="not both"):
        players_of("a", "b")


def test_the_interim_educator_keeps_all_of_its_model(tmp_path, monkeypatch):
    "QLoRA's base stays in 4 bits when the interim educator answers: the spec is passed whole."
    from poetry_iter.runs import open_run
    from poetry_iter.workshop.questions import open_teacher

    run = open_run(tmp_path / "a-run")
    base = ModelSpec(name="Qwen/Qwen2.5-7B-Instruct", renderer="chat", engine="unsloth", load_in_4bit=True)
    row = {"base": base.name, "base_hash": base.name, "renderer": "chat", "engine": "unsloth", "load_in_4bit": True, "where": "interim_educator", "step": 1, "rows_hash": "0"}
    run.add_checkpoint({**row, "name": "interim_educator", "round": 0, "parent": "base", "use": True})
    spec = open_teacher("interim", "", run, base=base).provider.spec
    assert spec == base.on(run.path / "interim_educator")
    with pytest.raises(UserError, match="has trained no interim educator"):
        open_teacher("interim", "", open_run(tmp_path / "another"), base=base)
