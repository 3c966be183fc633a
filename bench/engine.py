"""Sampling, scoring and a training step beside the real packages, one thread, processor time, pairs in turn: python bench/engine.py [--shapes 0.6b] [--no-peers]"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from poetry_iter.core import root
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.engines.gguf import write_gguf
from poetry_iter.engines.transformers import Transformers
from poetry_iter.poems import load_poems

VENV = root() / ".bench-venv"
PEERS = ["transformers==5.17.0", "lm-eval==0.4.13", "llama-cpp-python==0.3.36"]  # torch comes first, as pinned in settings.ini
logging.disable_progress_bar()


def random_model(folder):
    "Qwen3-0.6B's shapes with random weights, and the embedded model's tokenizer."
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072,
                         vocab_size=151936, max_position_embeddings=2048, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(root() / "data/model").save_pretrained(folder)


class Job:
    "What is measured: prompts to sample from, and examples to score."

    def __init__(self, folder, poems, n, tokens):
        self.lm, self.n = open_engine(ModelSpec(name=str(folder))), n
        r = self.lm.renderer
        self.prompts, self.sampling, self.end = [r.describe(p) for p in poems], Sampling(max_new_tokens=tokens), r.end
        self.examples = [r.example("Sea, wind and salt.", p.title, p.content) for p in poems]

    def ours(self): return sum(len(c.tokens) for said in self.lm.sample(self.prompts, self.end, self.n, self.sampling) for c in said)

    def padded(self):
        "Our path for models that are not known: transformers' step and cache."
        known, Transformers.forward = Transformers.forward, None
        try: return self.ours()
        finally: Transformers.forward = known

    def generate(self, at_once=20):
        "transformers' generate, n sequences a prompt."
        width, pad, said = max(map(len, self.prompts)), self.lm.tokenizer.pad_token_id, 0
        for i in range(0, len(self.prompts), at_once):
            part = self.prompts[i : i + at_once]
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = self.lm.model.generate(ids, attention_mask=mask, do_sample=True, temperature=0.9, top_p=0.95, top_k=40, num_return_sequences=self.n,
                                         max_new_tokens=self.sampling.max_new_tokens, eos_token_id=self.end, pad_token_id=pad)
            said += sum(row.index(self.end) + 1 if self.end in row else len(row) for row in out[:, width:].tolist())
        return said

    def score(self):
        self.lm.token_losses(self.examples)
        return sum(map(len, self.examples))

    @torch.inference_mode()
    def plain(self):
        "One example at a time, all of its logits."
        for e in self.examples:
            ids = torch.tensor([e.tokens])
            F.cross_entropy(self.lm.lm(input_ids=ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
        return sum(map(len, self.examples))

    def peer(self, how, folder):
        "Another package in its own environment, on the same tokens."
        split = [(e.tokens[: len(e) - sum(e.mask)], e.tokens[len(e) - sum(e.mask) :]) for e in self.examples]
        with tempfile.TemporaryDirectory() as work:
            gguf = write_gguf(folder, Path(work) / "model.gguf", dtype="F32") if how != "hflm" else ""
            job = {"threads": torch.get_num_threads(), "n": self.n, "end": self.end, "max_new_tokens": self.sampling.max_new_tokens, "prompts": self.prompts, "examples": split, "gguf": str(gguf)}
            env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
            done = subprocess.run([VENV / "bin/python", root() / "bench/peers.py", how, str(folder)], input=json.dumps(job), capture_output=True, text=True, env=env)
        if done.returncode: return None
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return found["cpu"] / (found["tokens"] if how != "hflm" else sum(map(len, self.examples))), found["peak_mb"]


def peers_environment():
    "The peers' packages, torch first so that none of them chooses it; llama.cpp is built from source, which takes ten minutes."
    if (VENV / "done").exists(): return
    torch_pin = next(x for x in (root() / "settings.ini").read_text().split() if x.startswith("torch~="))
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    for packages in ([torch_pin], PEERS): subprocess.run([VENV / "bin/pip", "install", "-q", *packages], check=True)
    (VENV / "done").touch()


def cost(f):
    "Processor seconds a token."
    start = time.process_time()
    tokens = f()
    return (time.process_time() - start) / tokens


def roof(rows=512, inner=1024, columns=3072, times=20):
    "GFLOP/s of a matrix product."
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    return 2 * rows * inner * columns / min(cost(lambda: F.linear(a, b) is None or 1) for _ in range(times)) / 1e9


def pair(name, ours, others, repeats):
    "Ours and others in turn; medians of the ratios."
    ours()
    rows = [(cost(ours), [cost(f) for f in others.values()]) for _ in range(repeats)]
    print(f"{name}: ours {sorted(1 / a for a, _ in rows)[len(rows) // 2]:.0f} tokens/s")
    for k, other in enumerate(others):
        ratios = sorted(b[k] / a for a, b in rows)
        print(f"  {ratios[len(ratios) // 2]:5.2f} times as fast as {other} ({ratios[0]:.2f} … {ratios[-1]:.2f})", flush=True)
    return min(a for a, _ in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="embedded", choices=["embedded", "0.6b"])
    parser.add_argument("--no-peers", action="store_true", help="only what is installed here")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.no_peers: peers_environment()
    with tempfile.TemporaryDirectory() as work:
        folder = root() / "data/model" if args.shapes == "embedded" else Path(work)
        if args.shapes != "embedded": random_model(folder)
        poems = load_poems(root() / "data/tiny_poems.jsonl")[0]
        job = Job(folder, poems[:50], 4, 160) if args.shapes == "embedded" else Job(folder, poems[:8], 4, 32)
        others = {"transformers' generate": job.generate, "our way without a forward of our own": job.padded}
        sample = pair(f"sample {len(job.prompts)} x {job.n}", job.ours, others, args.repeats)
        score = pair(f"score {len(job.examples)}", job.score, {"the plain loop": job.plain}, args.repeats)
        flops = 2 * sum(p.numel() for name, p in job.lm.lm.named_parameters() if "embed" not in name)
        head = 2 * job.lm.lm.get_output_embeddings().weight.numel() * sum(sum(e.mask) for e in job.examples) / sum(map(len, job.examples))
        print(f"  {(flops + head) / score / 1e9 / roof():.2f} of the roof of a matrix product ({roof():.0f} GFLOP/s)")
        if args.no_peers: return
        for how, own in (("llama", sample), ("llama-one", sample), ("hflm", score)):
            found = job.peer(how, folder)
            print(f"  {how}: " + (f"ours is {found[0] / own:.2f} times as fast; it peaks at {found[1]:.0f} MB" if found else "did not run"), flush=True)


if __name__ == "__main__":
    main()
