"""The server under load: tokens a second for one client and for eight, their ratio, and what becomes of 32 and 64 at once.

    python bench/serve.py --tokens 64

The server is a process of its own on the model that ships; the clients are threads here.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def ask(at: str, tokens: int, seed: int) -> dict:
    """One streamed answer: tokens, seconds to the first and to the last, or the status it was refused with."""
    body = {"model": "embedded", "messages": [{"role": "user", "content": "Write a poem about rain."}], "options": {"num_predict": tokens, "seed": seed, "temperature": 1.5, "top_p": 1}}
    began, first = time.perf_counter(), 0.0
    try:
        with urlopen(Request(f"{at}/api/chat", json.dumps(body).encode()), timeout=600) as r:
            rows = []
            for line in r:
                first = first or time.perf_counter() - began
                rows.append(json.loads(line))
    except HTTPError as e:
        return {"status": e.code, "retry": e.headers.get("retry-after")}
    return {"status": 200, "tokens": rows[-1]["eval_count"], "first": first, "whole": time.perf_counter() - began}


def at_once(at: str, clients: int, tokens: int, each: int = 1) -> float:
    """Tokens a second of that many clients, each asking some times in a row; prints a line about them."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [x for xs in pool.map(lambda c: [ask(at, tokens, 100 * c + i) for i in range(each)], range(clients)) for x in xs]
    seconds, done = time.perf_counter() - began, [f for f in found if f["status"] == 200]
    total, firsts, wholes = sum(f["tokens"] for f in done), sorted(f["first"] for f in done), sorted(f["whole"] for f in done)
    refused = [f for f in found if f["status"] == 503]
    middle = lambda xs: xs[len(xs) // 2]
    line = f"{clients:>3} clients: {len(done)} of {len(found)} answered, {total} tokens in {seconds:.1f} s, {total / seconds:.0f} a second; first token {middle(firsts):.2f} s in the middle, {firsts[-1]:.2f} at most; whole {middle(wholes):.2f}, {wholes[-1]:.2f}"
    print(line + (f"; {len(refused)} refused, retry after {sorted({f['retry'] for f in refused})} s" if refused else ""))
    return total / seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    command = "import sys; from poetry_iter.pipeline.command_line import main; sys.exit(main())"
    server = subprocess.Popen([sys.executable, "-c", command, "serve", "--port", "0", "--places", str(args.places)], stderr=subprocess.PIPE, text=True)
    try:
        at = next(word for word in server.stderr.readline().split() if word.startswith("http"))
        ask(at, 8, 0)
        rates = [(at_once(at, 1, args.tokens, 4), at_once(at, 8, args.tokens, 2)) for _ in range(args.repeats)]  # in turn, for the machine is never the same
        ratios = sorted(eight / one for one, eight in rates)
        print(f"eight clients get {ratios[len(ratios) // 2]:.1f} times the tokens of one ({', '.join(f'{r:.1f}' for r in ratios)})")
        at_once(at, 32, args.tokens // 2)
        at_once(at, 2 * args.places, 4)
    finally:
        server.terminate()
        server.wait()
