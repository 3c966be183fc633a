"""Describing and scoring with one worker and with several: python bench/workers.py [--poems 500] [--workers 2] [--repeats 5]

Wall time tells on an idle machine alone. Beside it stands the processor time of each worker, which a busy machine disturbs less: the longest of them is what a machine with a core for each would wait for.
"""

import argparse
import importlib.util
import statistics
import time
from importlib import import_module

import psutil

from poetry_iter.core import root, shared_data
from poetry_iter.descriptions import describe
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.poems import load_poems
from poetry_iter.scoring import score


def cpu(pid):
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def measure(lm, poems, n, tokens):
    "Wall seconds, processor seconds of this process, and of each worker."
    pids = import_module("ray").get([w.pid.remote() for w in lm.workers])
    before, own, start = [cpu(p) for p in pids], time.process_time(), time.perf_counter()
    rows = describe(lm, poems, n, Sampling(max_new_tokens=tokens), seed=1)
    score(lm, poems, rows)
    return time.perf_counter() - start, time.process_time() - own, [cpu(p) - b for p, b in zip(pids, before)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--poems", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="descriptions a poem")
    parser.add_argument("--tokens", type=int, default=96, help="longest description")
    args = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        return print("ray is not installed: pip install 'poetry_iter[ray]'")
    poems = [p for p in load_poems(shared_data("more_poems.jsonl") or root() / "data/tiny_poems.jsonl")[0] if len(p.content) < 1200][: args.poems]
    engines = {n: open_engine(ModelSpec(engine="ray", workers=n)) for n in (1, args.workers)}
    for lm in engines.values():
        describe(lm, poems[:8], 1, Sampling(max_new_tokens=4))  # the workers are up, and the model is read
    found = {n: [] for n in engines}
    for _ in range(args.repeats):
        for n, lm in engines.items():
            found[n].append(measure(lm, poems, args.samples, args.tokens))
    print(f"{len(poems)} poems, {args.samples} descriptions of at most {args.tokens} tokens, described and scored; median of {args.repeats}; load {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores")
    wall = {n: statistics.median(w for w, _, _ in rows) for n, rows in found.items()}
    path = {n: statistics.median(own + max(each) for _, own, each in rows) for n, rows in found.items()}
    for n, rows in found.items():
        each = [sorted(e) for _, _, e in rows]
        print(f"{n} workers: {wall[n]:.1f} s of wall time; processor time: {statistics.median(own for _, own, _ in rows):.2f} s here, {' + '.join(f'{s:.1f}' for s in each[len(each) // 2])} s of the workers")
    serial = statistics.median(own / (own + sum(each)) for _, own, each in found[1])
    print(f"{args.workers} workers are {wall[1] / wall[args.workers]:.2f} times as fast as one by wall time, {path[1] / path[args.workers]:.2f} by processor time on the longest path")
    print(f"serial share {serial:.4f} (processor time of this process with one worker)")
    shards = len(engines[1].shards(poems, args.samples, []))
    print(f"the samples are {shards} shards: more workers than that find nothing to do")
    for n in (8, 16, 32, 64):
        print(f"  {n} workers: {1 / (serial + (1 - serial) / n):.1f} times as fast, an extrapolation by Amdahl's law, not measured")
    for lm in engines.values():
        lm.close()


if __name__ == "__main__":
    main()
