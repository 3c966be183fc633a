"""The teacher with the vendor's real SDK against a local server that speaks its protocol: nothing lost, nothing paid twice, the cap never passed."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from poetry_iter.core import UserError
from poetry_iter.teacher import calls
from poetry_iter.teacher.client import make_teacher
from poetry_iter.teacher.requests import Request, worst

sys.path.insert(0, os.path.dirname(__file__))
from vendor_server import KEY, serve

VERDICT = {"type": "object", "properties": {"stronger": {"enum": ["A", "B"]}, "why": {"type": "string", "minLength": 5}},
           "required": ["stronger", "why"], "additionalProperties": False}
MODEL = "claude-opus-5-5"


@pytest.fixture
def vendor():
    with serve() as v:
        yield v


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A project of its own with a key in .env; pauses are remembered, not waited."""
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / ".env").write_text(f"ANTHROPIC_API_KEY={KEY}\nOPENAI_API_KEY='{KEY}'\n")
    monkeypatch.chdir(tmp_path)
    pauses = []
    real = calls.pause
    monkeypatch.setattr(calls, "pause", lambda trouble, attempt: pauses.append(real(trouble, attempt)) or 0)
    return pauses


def requests(n=6, **kw):
    return [Request(f"r{i}", [{"role": "system", "content": "You judge verse."}, {"role": "user", "content": f"Poem {i}?"}], "critique", "v1", 300, **kw) for i in range(n)]


def ask(vendor, cap=1.0, **kw):
    return make_teacher("anthropic", MODEL, cap_dollars=cap, base_url=vendor.url, progress=False, poll_seconds=0.01, **kw)


@pytest.mark.parametrize("batch", [False, True])
def test_answers_in_order_and_a_rerun_costs_nothing(vendor, batch):
    t = ask(vendor, batch=batch)
    answers = t.ask(requests())
    assert [a.id for a in answers] == [f"r{i}" for i in range(6)]
    assert [a.value for a in answers] == [f"An answer to 'Poem {i}?'." for i in range(6)]
    assert {(a.ended, a.provider, a.model, a.prompt_version, a.cached) for a in answers} == {("complete", "anthropic", MODEL, "v1", False)}
    assert t.spent == pytest.approx(vendor.billed) == pytest.approx(sum(a.dollars for a in answers))
    assert (vendor.count("messages"), vendor.count("batch")) == ((0, 1) if batch else (6, 0))
    seen, billed = len(vendor.seen), vendor.billed
    again = ask(vendor, batch=batch)
    assert again.plan(requests()).to_ask == 0
    rerun = again.ask(requests())
    assert ([a.value for a in rerun], {a.cached for a in rerun}) == ([a.value for a in answers], {True})
    assert (again.calls, len(vendor.seen), vendor.billed) == (0, seen, billed)
    assert again.spent == pytest.approx(billed)


def test_a_batch_is_half_the_price(vendor):
    ask(vendor, account="one").ask(requests())
    one = vendor.billed
    t = ask(vendor, account="two", cache_dir="elsewhere", batch=True)
    t.ask(requests())
    assert t.spent == pytest.approx(one / 2) == pytest.approx(vendor.billed - one)


def test_the_plan_comes_before_any_call_and_needs_no_key(vendor, tmp_path):
    (tmp_path / ".env").unlink()
    t = ask(vendor)
    plan = t.plan(requests())
    assert (plan.to_ask, vendor.seen) == (6, [])
    assert 0 < plan.dollars < plan.most
    shown = t.dry_run(requests())
    assert "Poem 0?" in shown and "Poem 1?" not in shown and "You judge verse." in shown and "$" in shown
    assert vendor.seen == []
    with pytest.raises(UserError, match=r"no ANTHROPIC_API_KEY: set it in the environment or in .*env"):
        t.ask(requests())
    assert vendor.seen == [] and t.spent == 0


@pytest.mark.parametrize("fault, waits", [("429", 1.0), ("529", None), ("500", None)])
def test_what_passes_is_tried_again(vendor, quick, fault, waits):
    vendor.faults.extend([fault, fault])
    t = ask(vendor, concurrency=1)
    assert [a.ended for a in t.ask(requests(2))] == ["complete"] * 2
    assert vendor.count("messages") == 4
    assert t.spent == pytest.approx(vendor.billed)
    assert quick == [waits, waits] if waits else 0.75 <= quick[0] <= 1 and 1.5 <= quick[1] <= 2


@pytest.mark.parametrize("fault", ["cut", "cut_body", "html"])
def test_a_cut_connection_counts_as_paid(vendor, fault):
    vendor.faults.append(fault)
    t = ask(vendor, concurrency=1)
    assert [a.ended for a in t.ask(requests(2))] == ["complete"] * 2
    assert vendor.count("messages") == 3
    assert vendor.billed <= t.spent <= 1.0
    assert t.spent > sum(a.dollars for a in t.ask(requests(2)))  # the attempt without an answer is in the ledger in full


@pytest.mark.parametrize("batch", [False, True])
def test_how_an_answer_ended_is_a_value_and_is_kept(vendor, batch):
    (vendor.row_faults if batch else vendor.faults).extend(["truncated", "refusal", "empty", "invalid" if batch else "400"])
    t = ask(vendor, concurrency=1, batch=batch)
    answers = t.ask(requests(5))
    assert [a.ended for a in answers] == ["cut", "refused", "complete", "failed", "complete"]  # the empty one was repaired
    assert [a.value is None for a in answers] == [True, True, False, True, False]
    assert (answers[0].text and "invalid_request_error" in answers[3].reason) or "400" in answers[3].reason
    assert t.spent == pytest.approx(vendor.billed)
    before = vendor.billed
    again = ask(vendor, concurrency=1, batch=batch).ask(requests(5))
    assert [a.ended for a in again] == ["cut", "refused", "complete", "complete", "complete"]  # only what failed was asked again
    assert sum(not a.cached for a in again) == 1 and vendor.billed > before


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("faults, ended", [(["malformed"], "complete"), (["malformed", "malformed"], "malformed")])
def test_a_malformed_answer_has_one_repair_try(vendor, batch, faults, ended):
    (vendor.row_faults if batch else vendor.faults).extend(faults)
    t = ask(vendor, batch=batch)
    [answer] = t.ask(requests(1, schema=VERDICT))
    assert answer.ended == ended
    assert answer.value == ({"stronger": "A", "why": "a gutter in October"} if ended == "complete" else None)
    bodies = [r["params"] for k, b in vendor.seen if k == "batch" for r in b["requests"]] + [b for k, b in vendor.seen if k == "messages"]
    assert len(bodies) == 2 and bodies[0]["output_config"]["format"]["type"] == "json_schema"
    assert [m["role"] for m in bodies[1]["messages"]] == ["user", "assistant", "user"] and "no whole JSON" in bodies[1]["messages"][2]["content"]
    assert t.spent == pytest.approx(vendor.billed) == pytest.approx(answer.dollars)
    assert ask(vendor, batch=batch).ask(requests(1, schema=VERDICT))[0].ended == ended
    assert vendor.billed == pytest.approx(t.spent)


def test_a_parser_of_ones_own(vendor):
    def three_lines(text):
        if text.count("\n") != 2:
            raise ValueError("expected three lines")
        return text.split("\n")

    vendor.answer = lambda body: "a\nb\nc" if "expected three lines" in body["messages"][-1]["content"] else "a b c"
    [answer] = ask(vendor).ask(requests(1, check=three_lines))
    assert answer.value == ["a", "b", "c"] and vendor.count("messages") == 2


def test_rows_of_a_batch_that_expire_or_err_are_asked_again(vendor):
    vendor.row_faults.extend(["expired", None, "errored", "canceled", None, None, "expired"])
    t = ask(vendor, batch=True)
    answers = t.ask(requests())
    assert [a.ended for a in answers] == ["complete"] * 6
    assert [len(b["requests"]) for k, b in vendor.seen if k == "batch"] == [6, 3, 1]
    assert t.spent == pytest.approx(vendor.billed)
    vendor.row_faults.extend(["expired"] * 2)
    [answer] = ask(vendor, batch=True, tries=2).ask([Request("late", [{"role": "user", "content": "?"}], max_tokens=50)])
    assert (answer.ended, answer.value) == ("expired", None)


def test_polling_survives_errors(vendor, monkeypatch):
    import anthropic

    monkeypatch.setattr(anthropic.Anthropic, "_calculate_retry_timeout", lambda *a, **k: 0)
    vendor.faults.extend([None, "get:529", "get:500", "get:429"])
    vendor.batch_polls = 3
    assert [a.ended for a in ask(vendor, batch=True).ask(requests(2))] == ["complete"] * 2
    assert vendor.count("batch") == 1


def test_a_batch_whose_id_was_never_heard_is_found(vendor):
    vendor.faults.append("lost")
    t = ask(vendor, batch=True)
    assert [a.ended for a in t.ask(requests(3))] == ["complete"] * 3
    assert len(vendor.batches) == 1 and t.spent == pytest.approx(vendor.billed)


@pytest.mark.parametrize("batch", [False, True])
def test_the_cap_is_never_passed(vendor, batch):
    vendor.answer = lambda body: "a gutter, " * 400
    one = worst(ask(vendor).provider.price, ask(vendor).provider.body(requests(1)[0]), batch)
    t = ask(vendor, cap=one * 2.5, batch=batch, concurrency=8)
    answers = t.ask(requests(20), partial=True)
    ended = [a.ended for a in answers]
    assert set(ended) == {"complete", "over_cap"} and ended.count("complete") > 2
    assert vendor.billed <= t.spent <= t.cap
    assert t.cap - t.spent < one  # it stopped because not one more would fit
    with pytest.raises(UserError, match=r"the cap of .* is reached"):
        ask(vendor, cap=one * 2.5, batch=batch).ask(requests(20))
    billed = vendor.billed
    more = ask(vendor, cap=5.0, batch=batch).ask(requests(20))
    assert {a.ended for a in more} == {"complete"} and sum(a.cached for a in more) == ended.count("complete")
    assert vendor.billed > billed


def test_a_cap_too_small_for_one_request(vendor):
    with pytest.raises(UserError, match=r"cap_dollars 0.001 is too small for one request: .* up to \$0.0"):
        ask(vendor, cap=0.001).ask(requests())
    assert vendor.seen == []


def test_accounts_have_a_cap_each_and_share_the_answers(vendor):
    ask(vendor, account="a").ask(requests())
    t = ask(vendor, account="b")
    assert {a.cached for a in t.ask(requests())} == {True} and t.spent == 0


def test_calls_at_a_time(vendor):
    vendor.delay = 0.05
    ask(vendor, concurrency=3).ask(requests(9))
    assert 1 < vendor.most_at_once <= 3


@pytest.mark.parametrize("env, error", [({"ANTHROPIC_API_KEY": "sk-wrong-key-98765"}, "the key is wrong"), ({}, "no such model")])
def test_what_only_the_user_can_mend(vendor, monkeypatch, env, error):
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    model = MODEL if env else "claude-imagined"
    for batch in (False, True):
        t = make_teacher("anthropic", model, cap_dollars=1, base_url=vendor.url, progress=False, batch=batch, prices={"claude-imagined": {"input": 1, "output": 2}})
        with pytest.raises(UserError, match=error) as e:
            t.ask(requests())
        assert "98765" not in str(e.value)
        assert t.spent == 0 and vendor.billed == 0
    with pytest.raises(UserError, match="its price is not known"):
        make_teacher("anthropic", "claude-imagined")


def test_what_was_not_sent_is_not_reserved(vendor, monkeypatch):
    monkeypatch.setattr("poetry_iter.teacher.calls.ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))  # the others wait for their turn
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-wrong-key-98765")
    t = ask(vendor)
    with pytest.raises(UserError, match="the key is wrong"):
        t.ask(requests())
    assert t.spent == 0


def test_requests_that_all_fail_stop_early(vendor):
    vendor.faults.extend(["400"] * 50)
    with pytest.raises(UserError, match="3 requests failed and none was answered"):
        ask(vendor, concurrency=1).ask(requests(50))
    assert vendor.count("messages") <= 4


def test_the_persona_goes_through_the_vendors_cache(vendor):
    persona = "You are an educator who names the line. " * 60
    rows = [Request(f"{i}", [{"role": "system", "content": persona}, {"role": "user", "content": f"Poem {i}?"}], max_tokens=300) for i in range(3)]
    t = ask(vendor, concurrency=1)
    usage = [a.usage for a in t.ask(rows)]
    assert [u["cache_write"] > 0 for u in usage] == [True, False, False] and [u["cache_read"] > 0 for u in usage] == [False, True, True]
    assert next(b for k, b in vendor.seen if k == "messages")["system"][0]["cache_control"] == {"type": "ephemeral"}
    assert t.spent == pytest.approx(vendor.billed)


def test_the_key_is_in_no_file(vendor, tmp_path, capfd):
    vendor.faults.extend(["429", "cut", "400"])
    t = ask(vendor, concurrency=1)
    t.ask(requests(3))
    print(t, t.plan(requests()), t.dry_run(requests()))
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.name != ".env"]
    assert len(files) > 3
    assert not [f for f in files if KEY in f.read_text()]
    out = capfd.readouterr()
    assert KEY not in out.out + out.err and KEY not in os.environ.values()


def test_an_openai_compatible_endpoint(vendor):
    vendor.faults.extend(["529", "malformed", None, "truncated", "refusal"])  # the last row is refused, then the first is repaired
    t = make_teacher("openai", "tiny", base_url=f"{vendor.url}/v1", progress=False, concurrency=1)
    answers = t.ask([*requests(1, schema=VERDICT, temperature=0.3), *(Request(x, [{"role": "user", "content": x}]) for x in "abc")])
    assert [a.ended for a in answers] == ["complete", "complete", "cut", "refused"]
    assert answers[0].value["stronger"] == "A" and answers[0].origin() == {"provider": "openai", "model": "tiny", "prompt_version": "v1"}
    with pytest.raises(UserError, match="it has no batches"):
        make_teacher("openai", "tiny", base_url=f"{vendor.url}/v1", batch=True)


def in_a_child(url, where):
    """Ask in a process of its own, which kills itself at a point of the way; its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        t = make_teacher("anthropic", MODEL, cap_dollars=1, base_url=url, progress=False, poll_seconds=0.01, batch=where != "direct", concurrency=2)
        submit, put, stored = t.provider.submit, t.store.put, []

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "submit":  # the vendor has taken the batch, its id is not written
            t.provider.submit = lambda bodies, name: (submit(bodies, name), die())
        if where == "poll":
            t.provider.poll = die
        if where == "read":  # the results are here, none is read
            t.provider.row_reply = die
        if where == "direct":
            t.store.put = lambda key, record: die() if len(stored) == 3 else (stored.append(key), put(key, record))
        os._exit(0 if all(a.ok for a in t.ask(requests())) else 1)
    finally:
        os._exit(2)


@pytest.mark.parametrize("where", ["submit", "poll", "read", "direct"])
def test_a_killed_process_loses_nothing_and_pays_nothing_twice(vendor, where):
    assert in_a_child(vendor.url, where) == -signal.SIGKILL
    billed, batch = vendor.billed, where != "direct"
    t = ask(vendor, batch=batch)
    assert t.spent >= billed > 0  # what was out when it died is counted
    if batch:
        assert t.plan(requests()).to_ask == 0
    assert [a.ended for a in t.ask(requests())] == ["complete"] * 6
    if batch:
        assert (len(vendor.batches), vendor.count("batch"), vendor.billed) == (1, 1, billed)
        assert t.spent == pytest.approx(billed)
    else:  # only the two that were out at that moment are asked again, and their first attempt is in the ledger
        assert vendor.count("messages") <= 8 and vendor.billed <= t.spent


def test_two_processes_do_not_pay_for_the_same(vendor):
    vendor.delay, children = 0.2, []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            os._exit(in_a_child(vendor.url, "nowhere"))
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert len(vendor.batches) == 1


def test_the_local_model_is_a_provider():
    model = Path(__file__).resolve().parents[1] / "data/model"
    if not (model / "model.safetensors").exists():
        pytest.skip("the embedded model is not there")
    rows = [Request(f"r{i}", [{"role": "user", "content": f"Write {i}."}], "brief", "v1", 12, temperature=0.8) for i in range(3)]
    t = make_teacher("local", str(model), progress=False)
    answers = t.ask(rows)
    assert {a.ended for a in answers} <= {"complete", "cut"} and answers[0].provider == "local" and t.spent == 0
    again = make_teacher("local", str(model), progress=False)
    assert [a.text for a in again.ask(rows)] == [a.text for a in answers] and again.calls == 0
    assert make_teacher("local", str(model), progress=False, cache_dir=None).ask(rows[1:2])[0].text == answers[1].text  # the seed goes with the request


def test_bad_annotations_are_named(tmp_path):
    (tmp_path / "annotated").mkdir()
    (tmp_path / "annotated/autopsies.jsonl").write_text('{"poem": "A\\n\\nb", "autopsy": "c"}\n{"poem": "A\\n\\nb", "autop')
    t = make_teacher("shipped", annotated="annotated", progress=False)
    with pytest.raises(UserError, match=r"autopsies\.jsonl, line 2"):
        t.ask([Request("1", [{"role": "user", "content": "?"}], "autopsy", about={"poem": "A\n\nb"})])


def test_a_ledger_that_was_cut_in_half_is_read(vendor, tmp_path):
    ask(vendor).ask(requests(2))
    path = tmp_path / "outputs/teacher/ledger.jsonl"
    spent = ask(vendor).spent
    path.write_bytes(path.read_bytes() + b'{"event": "reserve", "call": "abc", "dol')
    assert ask(vendor).spent == spent
    assert [a.ended for a in ask(vendor).ask(requests(3))] == ["complete"] * 3
    assert all(json.loads(line) for line in path.read_text().splitlines())
