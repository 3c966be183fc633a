"""The teacher with the vendor's real SDK against a local server that speaks its protocol: nothing lost, nothing paid twice, the cap never passed."""

import base64
import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

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


def test_polling_survives_errors(vendor, quick):
    vendor.faults.extend([None, "get:529", "get:500", "get:429", "get:wait for ever"])
    vendor.batch_polls = 3
    assert [a.ended for a in ask(vendor, batch=True).ask(requests(2))] == ["complete"] * 2
    assert vendor.count("batch") == 1 and quick[2] == 1.0 and quick[3] <= 8
    vendor.faults.extend([None, "get:wait a day"])
    with pytest.raises(UserError, match=r"it asks to come back in 24\.0 hours"):
        ask(vendor, batch=True).ask(requests(3))
    assert [a.ended for a in ask(vendor, batch=True).ask(requests(3))] == ["complete"] * 3 and vendor.count("batch") == 2


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
        t = make_teacher("anthropic", MODEL, cap_dollars=1, base_url=url, progress=False, poll_seconds=0.01, batch=where not in ("direct", "raw"), concurrency=2)
        submit, put, stored = t.provider.submit, t.store.put, []

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "submit":  # the vendor has taken the batch, its id is not written
            t.provider.submit = lambda bodies, name: (submit(bodies, name), die())
        if where == "raw":  # the third answer is on the disk, nothing has read it
            put_raw, came = t.store.put_raw, []
            t.store.put_raw = lambda *args: (put_raw(*args), came.append(1), die() if len(came) == 3 else None)
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


# --- money: what a vendor, a proxy or a net may do, and what it costs


def kept(tmp_path, folder="outputs/teacher/answers"):
    return [json.loads(f.read_text()) for f in sorted((tmp_path / folder).rglob("*.json"))]


def ledger_rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "outputs/teacher/ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batch", [False, True])
def test_a_key_that_is_said_again_stands_nowhere(vendor, tmp_path, batch):
    """In no sentence, no traceback as a notebook shows it, with the variables or without, no file."""
    from IPython.core.ultratb import AutoFormattedTB

    vendor.models = "missing"
    vendor.faults.append("echo the key")
    with pytest.raises(UserError, match=r"the key is wrong \(401: invalid x-api-key …\)") as e:
        ask(vendor, batch=batch).ask(requests())
    shown = "\n".join(AutoFormattedTB(mode="Verbose", theme_name="nocolor").structured_traceback(e.type, e.value, e.tb))
    assert KEY not in shown and e.value.__suppress_context__
    vendor.answer = lambda body: f"Your key is {KEY}."
    assert [a.ended for a in ask(vendor, batch=batch).ask(requests(2))] == ["complete"] * 2
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.name != ".env"]
    assert files and not [f for f in files if KEY.encode() in f.read_bytes()]


def test_keys_are_scrubbed_wherever_they_come_from(tmp_path, monkeypatch):
    from poetry_iter.core import scrub

    odd = 'odd"and\\long-enough'
    monkeypatch.setenv("PARLOUR_TOKEN", odd)
    assert scrub(f"{json.dumps(odd)} odd%22and%5Clong-enough {odd}") == '"…" … …'
    assert scrub(KEY) == "…"
    (tmp_path / ".env").write_bytes(b"ANTHROPIC_API_KEY=d\xfcrr\n")
    assert scrub("odd%22and%5Clong-enough") == "…"
    with pytest.raises(UserError, match=r"\.env: not UTF-8"):
        make_teacher("anthropic", MODEL, cap_dollars=1, base_url="http://127.0.0.1:9", progress=False).ask(requests())


LONG = "sk-ant/Zq7+x&=" + "0123456789abcdef"
WRITINGS = {
    "in an address": quote(LONG, safe=""),
    "with its slash": quote(LONG),
    "in small hex": re.sub("%..", lambda m: m[0].lower(), quote(LONG)),
    "in HTML": LONG.replace("&", "&amp;"),
    "in base64": base64.b64encode(LONG.encode()).decode(),
    "in a header": base64.b64encode(f"me:{LONG}".encode()).decode(),
    "for an address": base64.urlsafe_b64encode(f"m:{LONG}@".encode()).decode(),
    "in hex": LONG.encode().hex(),
    "over two lines": f"{LONG[:9]}\n   {LONG[9:]}",
    "over two lines of JSON": f"{LONG[:9]}\\r\\n{LONG[9:]}",
    "in spaces": " ".join(LONG),
    "with nothing seen between": "\u200b".join(LONG),
    "as UTF-16": "\0".join(LONG),
    "escaped": "".join(f"\\u{ord(c):04x}" for c in LONG),
}


@pytest.mark.parametrize("how", WRITINGS)
def test_a_key_in_another_writing_stands_nowhere(vendor, tmp_path, monkeypatch, how):
    """Said by an answer, by an ending, by an error of the service."""
    from poetry_iter.core import scrub

    monkeypatch.setenv("PARLOUR_API_KEY", LONG)
    assert "…" in scrub(WRITINGS[how]) and len(scrub(WRITINGS[how])) <= 10  # the letters around it in base64
    assert scrub(f"a {WRITINGS[how]} z") == f"a {scrub(WRITINGS[how])} z"
    assert scrub(f"a {WRITINGS[how]} z".encode()).decode() == scrub(f"a {WRITINGS[how]} z")
    vendor.answer = lambda body: f"Your key is {WRITINGS[how]}."
    assert WRITINGS[how] not in repr(ask(vendor).ask(requests(1)))
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and WRITINGS[how].encode() in f.read_bytes()]


@pytest.mark.parametrize("at", range(30, 75, 4))
def test_no_part_of_a_key_is_cut_off_before_it_is_known(at):
    """What a vendor said is quoted with its first letters: the key may stand where they end."""
    from poetry_iter.teacher.requests import charge, decode

    with pytest.raises(ValueError) as e:
        decode(b"x" * at + KEY.encode())
    assert KEY[:8] not in str(e.value)
    price = make_teacher("anthropic", MODEL, progress=False).provider.price
    assert KEY[:8] not in charge(price, {"input": "x" * at + KEY, "output": 1}, 1.0)[2]


def test_a_packed_answer_does_not_fill_the_memory(vendor):
    vendor.faults.append("packed")
    t = ask(vendor)
    assert [a.ended for a in t.ask(requests(1))] == ["complete"]
    assert "more than 67,108,864 bytes" in Path("outputs/teacher/ledger.jsonl").read_text()


def test_a_web_page_in_the_place_of_everything_costs_nothing(vendor):
    """A portal that comes up in the middle of a run: no call reached the vendor."""

    def answer(body):
        vendor.models = "html"
        vendor.faults.extend(["page"] * 50)
        return "An answer."

    vendor.answer = answer
    t = ask(vendor)
    with pytest.raises(UserError, match=r"a web page answers there, and no such service; .* nothing was billed"):
        t.ask(requests(12))
    assert t.spent == pytest.approx(vendor.billed) and vendor.count("messages") <= 1 + 4


def test_a_page_among_answers_may_have_been_billed(vendor):
    """The vendor is there: nobody knows whether it has answered before the page came."""
    vendor.faults.extend([None, "page"])
    t = ask(vendor)
    assert [a.ended for a in t.ask(requests(3))] == ["complete"] * 3
    assert t.spent == pytest.approx(vendor.billed + worst(t.provider.price, t.provider.body(requests(2)[1])), rel=0.02)


@pytest.mark.parametrize("odd", [{}, {"id": 5, "created_at": "soon"}, {"id": "x", "created_at": "2099-01-01T00:00:00Z", "request_counts": None}])
def test_an_odd_batch_in_the_list_hides_no_other(vendor, odd):
    vendor.odd_list = [odd]
    vendor.faults.append("lost")
    t = ask(vendor, batch=True)
    assert [a.ended for a in t.ask(requests())] == ["complete"] * 6
    assert (vendor.count("batch"), t.spent) == (1, pytest.approx(vendor.billed))


def test_a_reason_is_one_line_without_orders(vendor):
    vendor.answer, message = (lambda body: "An answer."), vendor.message
    vendor.message = lambda *args: {**message(*args), "stop_reason": "end\n\x1b[2Jturn\u202e"}
    assert [a.reason for a in ask(vendor).ask(requests(1))] == ["stop_reason end turn, which is not known here"]


def test_a_key_goes_to_its_vendor_over_https_alone():
    with pytest.raises(UserError, match="say https"):
        make_teacher("anthropic", MODEL, cap_dollars=1, base_url="http://api.anthropic.com", progress=False)
    with pytest.raises(UserError, match="more than an address stands in it") as e:
        make_teacher("openai", "m", cap_dollars=1, base_url=f"https://vendor.org/v1?key={KEY}", key_name="OPENAI_API_KEY", prices="1/2", progress=False)
    assert KEY not in str(e.value)


@pytest.mark.parametrize("fault", ["odd ending", "half a character", "odd type", "no result", "odd name"])
def test_an_odd_row_of_a_batch_takes_nothing_with_it(vendor, tmp_path, fault):
    vendor.row_faults.extend([None, fault])
    t = ask(vendor, batch=True)
    answers = t.ask(requests(4))
    assert [a.ended for a in answers] == ["complete", "malformed", "complete", "complete"]
    assert answers[1].reason and vendor.billed <= t.spent <= 4 * worst(t.provider.price, t.provider.body(requests(1)[0]), True)
    assert len(list((tmp_path / "outputs/teacher/batches").iterdir())) == 1
    again = ask(vendor, batch=True)
    assert [a.ended for a in again.ask(requests(4))] == [a.ended for a in answers]  # it is not asked for again, and locks nothing
    assert (vendor.count("batch"), again.calls, again.ledger.open) == (1, 0, {})


@pytest.mark.parametrize("fault", ["odd ending", "half a character"])
def test_an_odd_answer_is_kept_with_its_text(vendor, tmp_path, fault):
    vendor.faults.extend([None, fault])
    t = ask(vendor, concurrency=1)
    answers = t.ask(requests(3))
    assert [a.ended for a in answers] == ["complete", "malformed", "complete"]
    assert "Poem 1" in answers[1].text and ("out_of_ink" in answers[1].reason or "half a character" in answers[1].reason)
    assert (vendor.count("messages"), t.spent) == (3, pytest.approx(vendor.billed))
    assert len([f for f in (tmp_path / "outputs/teacher/raw").rglob("*-*")]) == 3  # the bytes as they came


@pytest.mark.parametrize("times", [1, 99])
def test_results_that_end_early_are_read_again_and_never_paid_again(vendor, times):
    vendor.ends_early, vendor.loses_rows = times, 2
    t = ask(vendor, batch=True, tries=3)
    if times == 99:
        with pytest.raises(UserError, match=r"4 of 6 rows came; the rest is not lost: run again \(batch msgbatch_0000; "):
            t.ask(requests())
        assert t.spent > vendor.billed  # what is reserved still counts
        vendor.ends_early = 0
    assert [a.ended for a in ask(vendor, batch=True).ask(requests())] == ["complete"] * 6
    assert (vendor.count("batch"), t.spent) == (1, pytest.approx(vendor.billed))


@pytest.mark.parametrize("minutes", [-6, 6])
@pytest.mark.parametrize("kill", [False, True])
def test_a_lost_batch_is_found_by_the_vendors_clock(vendor, minutes, kill):
    from datetime import timedelta

    vendor.clock = timedelta(minutes=minutes)
    if kill:
        assert in_a_child(vendor.url, "submit") == -signal.SIGKILL
    else:
        vendor.faults.append("lost")
    t = ask(vendor, batch=True)
    assert [a.ended for a in t.ask(requests())] == ["complete"] * 6
    assert (vendor.count("batch"), t.spent) == (1, pytest.approx(vendor.billed))


@pytest.mark.parametrize("fault, says", [("html", "unreadable: no JSON but '<html>a proxy</html>'"), ("page", "unreadable: no JSON"), ("nonsense", "unreadable: no message but"),
                                         ("odd ending", "stop_reason out_of_ink"), ("cut_body", "connection: ")])  # fmt: skip
def test_a_few_like_errors_end_the_run_with_their_cause(vendor, fault, says):
    vendor.faults.extend([fault] * 100)
    t = ask(vendor, cap=2.0)
    with pytest.raises(UserError, match=f"3 like errors and no answer between them: {says}"):
        t.ask(requests(12))
    one = worst(t.provider.price, t.provider.body(requests(1)[0]))
    assert vendor.count("messages") == 3 and vendor.billed <= t.spent <= 3 * one
    vendor.faults.clear()
    ended = [a.ended for a in ask(vendor, cap=2.0).ask(requests(12))]
    assert ended == (["malformed"] * 3 if fault == "odd ending" else ["complete"] * 3) + ["complete"] * 9


def test_one_bad_moment_among_good_ones_is_no_reason_to_stop(vendor):
    vendor.faults.extend([None, "html", None, "html", None, "html", None, "html", None, *["400"] * 4])
    answers = ask(vendor, cap=5.0, concurrency=1).ask(requests(10))
    assert [a.ended for a in answers] == ["complete"] * 5 + ["failed"] * 4 + ["complete"]


def test_a_batch_of_which_nothing_can_be_used_ends_the_run(vendor):
    vendor.row_faults.extend(["invalid"] * 6)
    with pytest.raises(UserError, match="3 requests failed and none was answered: invalid_request_error"):
        ask(vendor, batch=True).ask(requests())
    assert ask(vendor, batch=True).spent == vendor.billed == 0


def test_the_address_is_part_of_the_question(vendor):
    t = ask(vendor)
    t.ask(requests(2))
    with serve(lambda body: "another's") as other:
        assert {a.value for a in ask(other).ask(requests(2))} == {"another's"}
    there = make_teacher("anthropic", MODEL, cap_dollars=1, progress=False)
    assert there.provider.identity == "anthropic" and there.plan(requests(2)).to_ask == 2


def test_answers_that_were_kept_before_are_found(vendor, tmp_path):
    """The hash of an answer from the vendor's own address is what it was."""
    from poetry_iter.core import digest

    t = make_teacher("anthropic", MODEL, cap_dollars=1, progress=False)
    body = {"model": MODEL, "max_tokens": 300 + 2048, "messages": [{"role": "user", "content": "Poem 0?"}], "system": "You judge verse."}
    key = digest(["anthropic", body, 0], 32)
    path = tmp_path / f"outputs/teacher/answers/{key[:2]}/{key}.json"
    path.parent.mkdir(parents=True)
    reply = {"text": "The gutter.", "ended": "complete", "usage": {"input": 9, "cache_write": 0, "cache_read": 0, "output": 4}, "reason": "", "model": MODEL}
    path.write_text(json.dumps({"key": key, "provider": "anthropic", "model": MODEL, "body": body, "reply": reply, "dollars": 0.01, "batch": None, "at": "2026-11-20T10:00:00+00:00"}))
    [answer] = t.ask(requests(1))  # no key, no net
    assert (answer.value, answer.cached, answer.dollars) == ("The gutter.", True, 0.01)


def test_a_killed_call_is_shown_and_settled(vendor, tmp_path):
    from poetry_iter.teacher.ledger import ledger_main

    vendor.idempotent = True
    assert in_a_child(vendor.url, "raw") == -signal.SIGKILL  # its bytes are here, nothing has read them
    billed, asked = vendor.billed, vendor.count("messages")
    t = ask(vendor)
    assert [a.ended for a in t.ask(requests())] == ["complete"] * 6
    again = vendor.count("messages") - 6
    assert 0 <= again <= asked - 1 and vendor.paid_twice == 0  # what was on its way is asked again, by the same name: this vendor gives what it has
    shown = ledger_main()
    assert shown.count("open  ") == len(t.ledger.open) and "default" in shown
    ledger_main(settle=1.0)
    assert len(t.ledger.open) == len(ask(vendor).ledger.open)  # none is a day old
    ledger_main(settle=0, unbilled=True)
    assert ask(vendor).ledger.open == {} and ask(vendor).spent == pytest.approx(vendor.billed) and vendor.billed >= billed


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("fault", ["no usage", "usage not counted", "negative usage", "usage in words", "usage NaN", "usage without end"])
def test_usage_that_cannot_be_read_counts_at_the_worst_price(vendor, fault, batch):
    (vendor.row_faults if batch else vendor.faults).append(fault)
    t = ask(vendor, concurrency=1, batch=batch)
    answers = t.ask(requests(2))
    assert [a.ended for a in answers] == ["complete"] * 2
    one = worst(t.provider.price, t.provider.body(requests(1)[0]), batch)
    assert answers[0].dollars == pytest.approx(one) and t.spent == pytest.approx(one + answers[1].dollars) and t.spent >= vendor.billed


@pytest.mark.parametrize("fault, waits", [("wait for ever", None), ("wait two seconds", 2.0)])
def test_what_a_vendor_asks_to_wait_is_read_with_care(vendor, quick, fault, waits):
    vendor.faults.append(fault)
    assert [a.ended for a in ask(vendor, concurrency=1).ask(requests(1))] == ["complete"]
    assert quick == [waits] if waits else 0.75 <= quick[0] <= 1


@pytest.mark.parametrize("batch", [False, True])
def test_a_day_is_not_waited(vendor, quick, batch):
    vendor.faults.append("wait a day")
    t = ask(vendor, concurrency=1, batch=batch)
    with pytest.raises(UserError, match=r"429: it asks to come back in 24\.0 hours, at 20..-..-.. ..:.. .*; nothing is lost: run again then"):
        t.ask(requests(3))
    assert quick == [] and t.spent == 0 and vendor.count("messages") + vendor.count("batch") == 1


def test_a_teacher_that_is_not_there_is_told_in_seconds(vendor, monkeypatch):
    import socket
    import time

    def refused(says, **kw):
        start = time.monotonic()
        with pytest.raises(UserError, match=says):
            make_teacher(**{"provider": "anthropic", "model": MODEL, "cap_dollars": 1, "progress": False, **kw}).ask(requests())
        assert time.monotonic() - start < 5

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        refused("anthropic at http://127.0.0.1:.* cannot be reached .*; nothing was asked", base_url=f"http://127.0.0.1:{s.getsockname()[1]}")
    refused("base_url 'not a url': no address; expected one as http", base_url="not a url")
    refused("base_url: a name or a password stands in it", base_url="http://me:secret@127.0.0.1")
    refused("its OPENAI_API_KEY is not sent there; say key_name", provider="openai", base_url="https://models.example.org/v1", prices="1/2")
    refused("never the key itself", provider="openai", base_url="https://models.example.org/v1", prices="1/2", key_name=KEY)
    monkeypatch.setattr("poetry_iter.teacher.providers.registry.REACH_SECONDS", 0.2)
    vendor.models = "nothing"
    refused("cannot be reached .*timed out", base_url=vendor.url)
    vendor.models = "html"
    refused("a web page answers there, and no such service", base_url=vendor.url)
    vendor.models = "list"
    vendor.faults.append("redirect")
    refused(r"the address sends elsewhere \(307\), and a key does not follow", base_url=vendor.url)
    for key, says in [("sk-0123\n456789", "ANTHROPIC_API_KEY: a line break stands in it"), ("sk-0123 456789", "a space stands in it"), ("sk-0123456“", r"the character U\+201C")]:
        monkeypatch.setenv("ANTHROPIC_API_KEY", key)
        refused(says, base_url=vendor.url)
    assert vendor.count("messages") == 1 and vendor.billed == 0


def test_a_slow_vendor_is_waited_for(vendor):
    vendor.delay = 0.3
    assert [a.ended for a in ask(vendor).ask(requests(3))] == ["complete"] * 3


def test_any_compatible_endpoint_is_a_row_or_an_address(vendor, monkeypatch):
    """A price, an address and the name of a key are all that another service needs."""
    monkeypatch.setenv("EXAMPLE_API_KEY", KEY)
    t = make_teacher("openai", "dear", base_url=f"{vendor.url}/v1", key_name="EXAMPLE_API_KEY", prices="1/2", cap_dollars=1, progress=False)
    assert [a.ended for a in t.ask(requests(3))] == ["complete"] * 3 and t.spent == pytest.approx(vendor.billed) and vendor.billed > 0
    monkeypatch.delenv("EXAMPLE_API_KEY")
    assert [a.cached for a in make_teacher("openai", "dear", base_url=f"{vendor.url}/v1", prices="1/2", cap_dollars=1, progress=False).ask(requests(3))] == [True] * 3
    for name, key in [("deepseek", "DEEPSEEK_API_KEY"), ("openrouter", "OPENROUTER_API_KEY")]:
        with pytest.raises(UserError, match=f"no {key}"):
            make_teacher(name, "some-model", prices="0.27/1.10", cap_dollars=1, progress=False).ask(requests(1))
    with pytest.raises(UserError, match="its price is not known; say prices"):
        make_teacher("deepseek", "some-model")


def test_a_provider_is_added_by_registering_it():
    from poetry_iter.teacher.providers import registry

    class Parrot:
        name, model, paid, repairs, stored, batches, identity = "parrot", "parrot", False, False, False, False, "parrot"
        price = registry.price_of("parrot", {}, {"parrot": {"input": 0, "output": 0}})

        def body(self, request):
            return {"max_tokens": request.max_tokens, "messages": request.messages}

        def answers(self, bodies, seeds):
            return (registry.Reply(b["messages"][-1]["content"]) for b in bodies)

    registry.register(registry.ProviderKind(name="parrot", about="says it again", make=lambda kind, wanted: Parrot(), model="parrot"))
    try:
        assert "parrot" in registry.provider_names()
        assert [a.value for a in make_teacher("parrot", progress=False).ask(requests(2))] == ["Poem 0?", "Poem 1?"]
    finally:
        registry._KINDS.pop("parrot")


def test_the_local_model_is_opened_as_it_was_asked_for():
    """The whole spec goes along, the four bits included."""
    from poetry_iter.engine import ModelSpec

    t = make_teacher("local", ModelSpec(name="Qwen/Qwen2.5-7B-Instruct", engine="unsloth", load_in_4bit=True, renderer="thinking"), progress=False)
    assert (t.provider.spec.load_in_4bit, t.provider.spec.engine, t.provider.spec.renderer) == (True, "unsloth", "thinking")


def test_every_fault_in_short(capsys):
    """The table of `tests/soak_teacher.py`, each fault at one place: nothing is paid twice, no dollar is missing, every ending is a sentence."""
    from soak_teacher import soak

    assert soak(short=True) == [], capsys.readouterr().out


def test_the_stages_may_name_every_provider():
    """What the comments of the parameters allow is the table, and what the stage itself adds."""
    from poetry_iter.pipeline.experiments import read_stage
    from poetry_iter.teacher.providers.registry import provider_names

    home = Path(__file__).resolve().parents[1] / "nbs/workshop"
    for stage, name, more in [("1_hard_tasks", "hard_provider", set()), ("3_easy_tasks", "easy_provider", {"interim"}), ("4_poet_pairs", "poet_pairs", {"human"})]:
        parameter = read_stage(home / f"{stage}.ipynb").parameters[name]
        assert set(parameter.domain.words) == {*provider_names(), *more}
