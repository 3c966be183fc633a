"""Our engine and llama.cpp's on the embedded model: tokens a second and memory, one client and eight, one thread, in turn: python bench/llamacpp.py"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from poetry_iter.core import root
from poetry_iter.engine import Sampling, open_engine, spec_named
from poetry_iter.engines.gguf import write_gguf
from poetry_iter.engines.llamacpp import quantize_gguf
from poetry_iter.poems import load_poems


def rate(lm, prompts, clients, tokens):
    "Tokens written in a second, by processor time and by the clock; so many prompts are asked at once."
    wall, cpu, said = time.perf_counter(), time.process_time(), 0
    for i in range(0, len(prompts), clients):
        part = prompts[i : i + clients]
        said += sum(len(c.tokens) for (c,) in lm.sample(part, lm.renderer.end, 1, Sampling(max_new_tokens=tokens), list(range(i, i + len(part)))))
    return {"cpu": said / (time.process_time() - cpu), "wall": said / (time.perf_counter() - wall)}


def measure(name, tokens):
    "In a process of its own: both rates, the memory that the model took with the libraries it loads, and the peak."
    import psutil

    before, lm = psutil.Process().memory_info().rss, open_engine(spec_named(name))
    prompts = [lm.renderer.context(p.title) for p in load_poems(root() / "data/tiny_poems.jsonl")[0][:16]]
    rate(lm, prompts[:8], 8, 4)
    found = {f"{clients}": rate(lm, prompts[: 8 * clients] if clients == 1 else prompts, clients, tokens) for clients in (1, 8)}
    return {**found, "model": (psutil.Process().memory_info().rss - before) / 2**20, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def of(found, clients, how):
    "The median rate of the repeats."
    return median(r[clients][how] for r in found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of the longest answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.tokens)))
        return
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: pip install 'poetry_iter[llamacpp]'; nothing to compare")
        return
    with tempfile.TemporaryDirectory() as work:
        f16 = write_gguf(root() / "data/model", Path(work) / "embedded-F16.gguf")
        models = {"transformers": "data/model", **{f"llamacpp {q}": str(quantize_gguf(f16, Path(work) / f"{q}.gguf", q)) for q in ("F16", "Q8_0", "Q4_K_M")}}
        rows = {name: [] for name in models}
        for _ in range(args.repeats):
            for name, model in models.items():
                command = [sys.executable, __file__, "--measure", model, "--tokens", str(args.tokens)]
                rows[name].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    print(f"{'':<18} tokens/s, one client (clock)   eight clients (clock)   MiB with libraries   peak")
    for name, found in rows.items():
        print(
            f"{name:<18} {of(found, '1', 'cpu'):10.0f} ({of(found, '1', 'wall'):.0f}) {of(found, '8', 'cpu'):20.0f} ({of(found, '8', 'wall'):.0f})"
            f" {median(r['model'] for r in found):18.0f} {median(r['peak'] for r in found):8.0f}"
        )


if __name__ == "__main__":
    main()
