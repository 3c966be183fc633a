"""What the workshop's data costs and becomes at the size of a real run: requests, price by model, cache hits of a rerun, what the gate refuses, the mix.

    python bench/workshop.py --bad ../shared/data/bad_poems.jsonl --good ../shared/data/more_poems.jsonl --limit-good 200 --limit-briefs 1000

The teacher is a local server that speaks the vendor's protocol and answers in the right shape; one answer in twelve is spoilt on purpose.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from vendor_server import KEY, serve

from poetry_iter.core import digest
from poetry_iter.poems import words
from poetry_iter.teacher.client import make_teacher, price_table
from poetry_iter.workshop.gate import collect, gate_counts, good_and_bad, requests_of
from poetry_iter.workshop.mix import divide, mix, mix_facts, sides, training_rows
from poetry_iter.workshop.questions import critique_items, pair_items
from poetry_iter.workshop.tasks import ORDER, poem_text, read_poem

BRIEF = f"Angle: one object, and who last held it.\nAvoid: golden light, silence, the heart, angels, the sands of time.\nImages: a workshop.\nForm: as it is.\n{ORDER}"


def answers(bad):
    """An answer in the shape of its task; one in twelve has none."""

    def answer(body):
        text = body["messages"][-1]["content"]
        number = int(digest(text), 16)
        if number % 12 == 0:
            return "I would call this 7/10, a powerful poem."
        if text.startswith("Compare"):
            a = read_poem(text.split("Poem A:\n\n")[1].split("\n\nPoem B:\n\n")[0]).id
            return f"Poem A names things and poem B names feelings.\n\nStronger: {'B' if a in bad else 'A'}"
        if text.startswith(("Write the brief", "Turn")):
            return BRIEF
        if text.startswith("Find the brief"):
            return f"Request: a poem about {number % 997} things\n{BRIEF}"
        if text.startswith("This poem failed"):
            return (
                "What fails: the end.\nWhy: it was decided before it was seen.\nWhat to put in its place: a man on a ladder with a bucket of leaves."
            )
        first = " ".join(words(read_poem(text.split("Poem:\n\n")[-1]).lines[0])[:4])
        if number % 9 == 0:
            return "What works: All of it.\n\nIssues:\nNone.\n\nThis poem is done."
        return (
            f'What works: The lines keep step.\n\nIssues:\n- General noun, line 1, "{first}": name the one thing that was there, and who had left it.'
        )

    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bad", default="data/bad_poems.jsonl")
    parser.add_argument("--good", default="data/tiny_poems.jsonl")
    parser.add_argument("--limit-good", type=int, default=200, help="good poems that are criticised")
    parser.add_argument("--limit-briefs", type=int, default=1000, help="good poems whose brief is found")
    parser.add_argument("--batch", action="store_true")
    args = parser.parse_args()
    good, bad, dropped = good_and_bad(args.good, args.bad)
    ids = {p.id for p in bad}
    print(f"{len(bad)} bad and {len(good)} good poems, {len(dropped)} dropped")
    items = {
        "critique": critique_items(good, bad, args.limit_good, 0, "anthropic", ""),
        "comparison": pair_items(good, bad, 0, 0, "anthropic", ""),
        "autopsy": [{"poem": poem_text(p), "title": p.title} for p in bad],
        "reading": [{"poem": poem_text(p), "title": p.title} for p in good[: args.limit_briefs]],
    }
    os.environ["ANTHROPIC_API_KEY"] = KEY
    with serve(answers(ids)) as vendor, tempfile.TemporaryDirectory() as folder:
        for name in ("first run", "rerun"):
            teacher = make_teacher(
                "anthropic",
                "claude-opus-5-5",
                cap_dollars=500,
                cache_dir=folder,
                base_url=vendor.url,
                batch=args.batch,
                poll_seconds=0.05,
                progress=False,
            )
            start, rows, refused, asked, hits = time.perf_counter(), {}, [], [], 0
            for task in ("critique", "comparison", "revision_brief", "autopsy", "reading"):
                if task == "revision_brief":
                    items[task] = [c for c in rows["critique"] if "This poem is done." not in c["critique"]]
                requests = requests_of(task, items[task])
                found = teacher.ask(requests)
                asked, hits = asked + requests, hits + sum(a.cached for a in found)
                rows[task], lost = collect(task, items[task], found)
                refused += lost
            print(
                f"\n{name}: {len(asked)} requests, {teacher.calls} sent, {hits} from the cache, ${teacher.spent:.2f} in the ledger, {time.perf_counter() - start:.0f} s"
            )
    print("\n" + price_table(asked).to_string(index=False, float_format="{:.2f}".format))
    print("\n" + gate_counts(rows, refused).to_string())
    rows["brief"] = rows.pop("reading")
    built = [r for task, found in rows.items() for r in training_rows(task, found, ids)]
    train, valid = divide(built, sides(built))
    mixed, found = mix(train)
    print(f"\n{len(train)} rows to train on and {len(valid)} held out; mixed: {found}\n{mix_facts(mixed, ids)}")


if __name__ == "__main__":
    main()
