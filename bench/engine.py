"""Speed of scoring and sampling as ratios, each pair measured in one run on the embedded model: python bench/engine.py"""

import time

import torch

from poetry_iter.core import root
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.poems import load_poems

REPEATS = 3
lm = open_engine(ModelSpec())
renderer = lm.renderer
poems = load_poems(root() / "data/tiny_poems.jsonl")[0][:32]
examples = [renderer.example("Sea, wind and salt.", p.title, p.content) for p in poems]
prompts = [renderer.describe(p) for p in poems]
sampling, n = Sampling(max_new_tokens=64), 4


def one_by_one():
    lm.token_losses(examples, batch_size=1)


def batched():
    lm.token_losses(examples)


def whole_logits():
    "The plain way: the logits of the padded batch, then the losses of the targets."
    with torch.inference_mode():
        for i in range(0, len(examples), 8):
            part = examples[i : i + 8]
            width = max(map(len, part))
            ids = torch.tensor([e.tokens + [0] * (width - len(e)) for e in part])
            logp = lm.model(input_ids=ids).logits.float().log_softmax(-1)
            logp[:, :-1].gather(-1, ids[:, 1:, None])


def shared_prefill():
    lm.sample(prompts, renderer.end, n, sampling)


def repeated_prompts():
    lm.sample([p for p in prompts for _ in range(n)], renderer.end, 1, sampling)


def the_engines_own():
    "transformers' generate on the same batch, n sequences a prompt."
    width = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id
    for i in range(0, len(prompts), 20):
        part = prompts[i : i + 20]
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in part])
        lm.model.generate(ids, attention_mask=(ids != pad).long(), do_sample=True, temperature=0.9, top_p=0.95, top_k=40, num_return_sequences=n,
                             max_new_tokens=64, eos_token_id=renderer.end, pad_token_id=pad)


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main():
    pairs = [("score: batched by tokens", batched, "one by one", one_by_one), ("score: targets only meet the head", batched, "logits of the whole batch", whole_logits),
             ("sample: 4 share a prefill", shared_prefill, "4 prompts", repeated_prompts), ("sample: our loop", shared_prefill, "transformers' generate", the_engines_own)]
    for name, ours, other_name, other in pairs:
        ours(), other()
        times = [(seconds(ours), seconds(other)) for _ in range(REPEATS)]
        ratios = sorted(b / a for a, b in times)
        print(f"{name:36} {ratios[REPEATS // 2]:5.2f} times as fast as {other_name} ({ratios[0]:.2f} … {ratios[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
