"""Time and peak memory of each part as poems become more: python bench/growth.py [10 100 1000]"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("load", "families", "describe", "score", "select")


def poems_file(path, count):
    "The shipped poems over and over, a word of each line moved, so that no two are the same."
    from poetry_iter.core import root
    from poetry_iter.poems import load_poems

    poems = load_poems(root() / "data/tiny_poems.jsonl")[0]
    with open(path, "w") as f:
        for i in range(count):
            p, turn = poems[i % len(poems)], i // len(poems)
            lines = [" ".join((w := line.split())[turn % len(w) :] + w[: turn % len(w)]) if line.strip() else "" for line in p.content.split("\n")]
            f.write(json.dumps({"title": f"{p.title} {turn}" if turn else p.title, "content": "\n".join(lines)}) + "\n")


def one(count):
    "All parts once, in this process."
    from poetry_iter.descriptions import describe
    from poetry_iter.engine import Sampling, open_engine
    from poetry_iter.poems import families, load_poems
    from poetry_iter.scoring import score
    from poetry_iter.selection import select

    with tempfile.TemporaryDirectory() as work:
        poems_file(Path(work) / "poems.jsonl", count)
        lm, last = open_engine(), {}
        steps = {"load": lambda: load_poems(Path(work) / "poems.jsonl", strict=False)[0], "families": lambda: families(last["load"]),
                 "describe": lambda: describe(lm, last["load"], 2, Sampling(max_new_tokens=64)), "score": lambda: score(lm, last["load"], last["describe"]),
                 "select": lambda: select(last["score"], 1)}
        for part in PARTS:
            start = time.process_time()
            last[part] = steps[part]()
            print(json.dumps({"part": part, "seconds": time.process_time() - start, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


def main():
    if sys.argv[1:2] == ["--one"]: return one(int(sys.argv[2]))
    counts = [int(x) for x in sys.argv[1:]] or [10, 100, 1000]
    print(f"{'poems':>8}" + "".join(f"{p:>22}" for p in PARTS))
    for count in counts:
        out = subprocess.run([sys.executable, __file__, "--one", str(count)], capture_output=True, text=True, check=True).stdout
        rows = {r["part"]: r for r in map(json.loads, out.strip().splitlines())}
        print(f"{count:>8}" + "".join(f"{rows[p]['seconds']:>12.2f} s {rows[p]['peak_mb']:>5.0f} MB" for p in PARTS), flush=True)


if __name__ == "__main__":
    main()
