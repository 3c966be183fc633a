"""Load figures of the teacher: what a full run of the workshop would ask and cost, and what a rerun costs, against a local server that speaks the vendor's protocol.

    python bench/teacher.py --bad ../shared/data/bad_poems.jsonl --good data/tiny_poems.jsonl --limit-good 200
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from vendor_server import KEY, serve

from poetry_iter.poems import load_poems
from poetry_iter.teacher.client import make_teacher, price_table
from poetry_iter.teacher.requests import Request

PERSONA = "You are an educator of poets. You judge the craft of a poem and not its author, you name the line, and you say what to do there. " * 15
TASKS = {"critique": (700, "Criticise this poem: what works, the issues with their places, a direction for each."),
         "comparison": (500, "Which of these two poems is the stronger, and by what?"),
         "revision_brief": (400, "Write a brief for the revision of this poem.")}


def requests(bad, good):
    """The hard tasks: critiques of all, a comparison and a revision brief for each bad poem."""
    ask = lambda task, name, text: Request(f"{task}-{name}", [{"role": "system", "content": PERSONA}, {"role": "user", "content": f"{TASKS[task][1]}\n\n{text}"}], task, "bench", TASKS[task][0])
    full = lambda p: f"{p.title}\n\n{p.content}"
    out = [ask("critique", f"{i}", full(p)) for i, p in enumerate([*bad, *good])]
    out += [ask("comparison", f"{i}", f"{full(p)}\n\n***\n\n{full(good[i % len(good)])}") for i, p in enumerate(bad)]
    return out + [ask("revision_brief", f"{i}", full(p)) for i, p in enumerate(bad)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bad", default="data/bad_poems.jsonl")
    parser.add_argument("--good", default="data/tiny_poems.jsonl")
    parser.add_argument("--limit-good", type=int, default=200)
    args = parser.parse_args()
    bad, good = load_poems(args.bad, strict=False)[0], load_poems(args.good, strict=False)[0][: args.limit_good]
    asks = requests(bad, good)
    print(f"{len(bad)} bad and {len(good)} good poems: {len(asks)} requests\n")
    print(price_table(asks).to_string(index=False, float_format="{:.2f}".format), "\n")
    os.environ["ANTHROPIC_API_KEY"] = KEY
    for batch in (False, True):
        with serve(lambda body: "A gutter. " * 120) as vendor, tempfile.TemporaryDirectory() as folder:
            make = lambda batch=batch, folder=folder, vendor=vendor: make_teacher("anthropic", "claude-opus-5-5", cap_dollars=60, cache_dir=folder, base_url=vendor.url, batch=batch, poll_seconds=0.05, progress=False)
            print(make().plan(asks))
            for name in ("first run", "rerun"):
                teacher, start, sent, billed = make(), time.perf_counter(), vendor.count("messages") + vendor.count("batch"), vendor.billed
                answers = teacher.ask(asks)
                calls = vendor.count("messages") + vendor.count("batch") - sent
                hits = sum(a.cached for a in answers)
                read = sum(a.usage["cache_read"] for a in answers) / sum(a.usage["cache_read"] + a.usage["cache_write"] + a.usage["input"] for a in answers)
                print(f"{name}: {sum(a.ok for a in answers)} answers, {calls} submissions, {hits} from the cache, ${vendor.billed - billed:.4f} charged, "
                      f"${teacher.spent:.4f} in the ledger, {read:.0%} of the input read from the vendor's cache, {time.perf_counter() - start:.1f} s")
            print()


if __name__ == "__main__":
    main()
