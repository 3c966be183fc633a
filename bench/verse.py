"""Speed of the verse tools beside `pronouncing` and `prosodic` (where installed), on the same lines in one run: python bench/verse.py [FILE.jsonl]"""

import importlib.util
import json
import os
import subprocess
import sys
import time

from poetry_iter.core import read_jsonl, root, shared_data
from poetry_iter.verse import forms, meter, rhyme

path = sys.argv[1] if len(sys.argv) > 1 else shared_data("more_poems.jsonl") or root() / "data/tiny_poems.jsonl"
poems = [row["content"] for row in read_jsonl(path)]
SMALL = 100  # poems for the slow ones


def count(texts):
    return sum(1 for t in texts for line in t.split("\n") if line.strip())


def clock(name, work, texts):
    "Seconds of the processor, so that a busy machine does not count."
    start = time.process_time()
    for t in texts:
        work(t)
    seconds = time.process_time() - start
    n = count(texts)
    print(f"{name:42} {n:7} lines  {seconds:7.2f} s  {1e6 * seconds / n:8.1f} µs a line", flush=True)
    return seconds / n


def pronouncing_scheme(text):
    "The usual way with `pronouncing`: lines whose last words share a rhyming part."
    parts, out = [], []
    for line in text.split("\n"):
        words = line.lower().strip(".,;:!?'\"—- ").split()
        found = {pronouncing.rhyming_part(p) for p in pronouncing.phones_for_word(words[-1])} if words else set()
        out.append(next((k for k in range(len(parts) - 1, -1, -1) if parts[k] & found), len(parts)))
        parts.append(found)
    return out


spent = [sum(os.times()[2:4])]  # processor time of children
for code in ("pass", "import numpy", "import poetry_iter.verse.forms, poetry_iter.verse.cards"):
    subprocess.run([sys.executable, "-c", code], check=True)
    spent.append(sum(os.times()[2:4]))
bare, numpy, ours = (b - a for a, b in zip(spent, spent[1:]))
print(f"import of all verse tools: {ours - bare:.2f} s over a bare interpreter, of which numpy takes {numpy - bare:.2f} s\n")
rhyme.scheme("warm\nstorm")
meter.poem("The dictionary is read at first use")

print(f"{path}: {len(poems)} poems")
times = {"rhyme": clock("rhyme.scheme, context", rhyme.scheme, poems[:SMALL])}
times["sound"] = clock("rhyme.scheme, by sound", lambda t: rhyme.scheme(t, context=False), poems[:SMALL])
times["meter"] = clock("meter.poem", meter.poem, poems[:SMALL])
if importlib.util.find_spec("pronouncing"):
    import pronouncing

    pronouncing.phones_for_word("a")
    theirs = clock("pronouncing, rhyming parts", pronouncing_scheme, poems[:SMALL])
    print(f"  ours takes {times['rhyme'] / theirs:.0f} times that with context, {times['sound'] / theirs:.0f} times by sound")
else:
    print("pronouncing is not installed: pip install pronouncing")
if importlib.util.find_spec("prosodic"):
    try:
        import prosodic

        prosodic.Text("The dictionary is read at first use").parse()
        few = poems[: SMALL // 10]
        theirs = clock("prosodic, parse", lambda t: prosodic.Text(t).parse(), few)
        print(f"  prosodic takes {theirs / clock('meter.poem, the same poems', meter.poem, few):.0f} times ours")
    except Exception as e:  # it wants espeak and a download of nltk's punkt
        print(f"prosodic cannot run here: {type(e).__name__}: {str(e)[:100]}")
else:
    print("prosodic is not installed: pip install prosodic (and espeak)")

print("\nwhole corpus: rhyme, meter, form and deviations, one core")
clock("forms.detect", forms.detect, poems)

print("\ntime against number of lines (one text without a stanza break)")
lines = [line for t in poems for line in t.split("\n") if line.strip()]
lines = (lines * (10_000 // len(lines) + 1))[:10_000]
for n in (1000, 2000, 4000, 8000):
    row = {}
    for name, work in (("scheme", rhyme.scheme), ("meter", meter.poem), ("detect", forms.detect)):
        start = time.process_time()
        work("\n".join(lines[:n]))
        row[name] = round(time.process_time() - start, 2)
    print(f"{n:6} lines  {json.dumps(row)} s")
