"""The teacher against every fault of the stand-in, one by one and in batches, with the vendor's real SDK: a table of counts.

    python tests/soak_teacher.py            # each fault at several places of the way
    python tests/soak_teacher.py --short    # at one place

Each row asks twelve requests (four in short), and then the same again, as a person would who reads the sentence and runs once more. It fails where a dollar that was charged is not in the ledger, where a
request is paid again though its answer had come whole, or where something else than one sentence ends a run.
"""

import argparse
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vendor_server import FAULTS, KEY, ODD, serve

from poetry_iter.core import UserError
from poetry_iter.teacher import calls
from poetry_iter.teacher.client import make_teacher
from poetry_iter.teacher.requests import Request

MODEL, CAP = "claude-opus-5-5", 2.0
NET = ["cut", "cut_body", "html", "page", "nonsense"]  # a message that never came, came by half, or is none
ENDINGS = ["truncated", "malformed", "refusal", "empty", *ODD]
ROWS = [*ENDINGS, "expired", "errored", "canceled", "invalid", "odd name", "odd type", "no result"]
BATCH = [*FAULTS, "cut", "lost", "html", "page", "nonsense"]
SETTINGS = ["ends early", "ends early for ever", "clock -6 minutes", "clock +6 minutes"]  # of a batch's results, and of a lost batch


def places(short):
    """Where a fault falls: at which of the first requests, and how often."""
    return [(1, 1)] if short else [(0, 1), (1, 1), (4, 3), (0, 99)]


def scenarios(short):
    """(name, batch, what to do to the vendor)."""
    for after, times in places(short):
        at = f"× {times} after {after}"
        faults = lambda v, f, after=after, times=times: v.faults.extend([None] * after + [f] * times)
        rows = lambda v, f, after=after, times=times: v.row_faults.extend([None] * after + [f] * times)
        yield from ((f"{f} {at}", False, faults, f) for f in [*FAULTS, *NET, *ENDINGS])
        yield from ((f"row: {f} {at}", True, rows, f) for f in ROWS)
        yield from ((f"submit: {f} {at}", True, lambda v, f, times=times: v.faults.extend([f] * times), f) for f in BATCH)
    yield from ((f"get: {f}", True, lambda v, f: v.faults.extend([None, f"get:{f}"]), f) for f in FAULTS)
    yield from ((s, True, setting, s) for s in SETTINGS)


def setting(v, name):
    """A manner of the vendor's that lasts."""
    v.ends_early, v.loses_rows = {"ends early": 1, "ends early for ever": 99}.get(name, 0), 2
    if name.startswith("clock"):
        v.clock = timedelta(minutes=int(name.split()[1]))
        v.faults.append("lost")


def once(url, folder, batch, n):
    """Ask; (how the answers ended, the sentence that ended the run, what the ledger says)."""
    t = make_teacher("anthropic", MODEL, cap_dollars=CAP, base_url=url, cache_dir=folder, batch=batch, poll_seconds=0.001, progress=False)
    asked = [Request(f"r{i}", [{"role": "user", "content": f"Poem {i}?"}], "critique", "v1", 300, check=whole) for i in range(n)]
    try:
        return [a.ended for a in t.ask(asked)], "", t.spent
    except UserError as e:
        return [], str(e), t.spent


def whole(text):
    """A parser that refuses what was cut short."""
    if not text.startswith("An answer"):
        raise ValueError("expected an answer")
    return text


def run(name, batch, do, fault, n):
    """A row of the table."""
    with serve() as v, tempfile.TemporaryDirectory() as folder:
        do(v, fault)
        ended, said, _ = once(v.url, folder, batch, n)
        first = ended
        if said or any(e in ("failed", "expired") for e in ended):  # a person mends it, and runs again
            v.faults.clear()
            v.row_faults.clear()
            v.ends_early = 0
        ended, again, spent = once(v.url, folder, batch, n)
        texts = [f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()]
        row = {"fault": name, "way": "batch" if batch else "direct", "answered": ended.count("complete"), "set aside": sum(e in ("malformed", "cut", "refused") for e in ended),
               "left": n - len(ended) + sum(e not in ("complete", "malformed", "cut", "refused") for e in ended), "first run": said or f"{first.count('complete')} answered", "then": again,
               "charged": v.billed, "ledger": spent, "paid twice": v.paid_twice}  # fmt: skip
        row["wrong"] = ("a dollar is missing; " if v.billed > spent + 1e-9 else "") + ("over the cap; " if spent > CAP else "") + ("paid twice; " if v.paid_twice else "")
        row["wrong"] += ("the key is in a file; " if any(KEY.encode() in t for t in texts) or KEY in said + again else "") + ("not finished; " if row["left"] or again else "")
        return row


def soak(short=False, only="", show=print):
    """All rows; those that are wrong."""
    os.environ["ANTHROPIC_API_KEY"] = KEY
    kept, calls.pause = calls.pause, lambda trouble, attempt: 0  # nothing is waited
    rows = []
    show(f"{'fault':<38} {'way':<6} {'answered':>8} {'aside':>5} {'left':>4} {'charged':>9} {'ledger':>9} {'twice':>5}  the first run")
    try:
        for name, batch, do, fault in scenarios(short):
            if only not in name:
                continue
            rows.append(r := run(name, batch, do, fault, 4 if short else 12))
            show(f"{name:<38} {r['way']:<6} {r['answered']:>8} {r['set aside']:>5} {r['left']:>4} {r['charged']:>9.4f} {r['ledger']:>9.4f} {r['paid twice']:>5}  {r['first run'][:110]}" + (f"  WRONG: {r['wrong']}{r['then']}" if r["wrong"] else ""))
    finally:
        calls.pause = kept
    wrong = [r for r in rows if r["wrong"]]
    show(f"{len(rows)} faults, {sum(bool(r['first run'].endswith('answered')) for r in rows)} met within the run, {sum(r['paid twice'] for r in rows)} requests paid twice, {len(wrong)} wrong")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="each fault at one place")
    parser.add_argument("--only", default="", help="faults with this in their name")
    args = parser.parse_args()
    sys.exit(bool(soak(args.short, args.only)))


if __name__ == "__main__":
    main()
