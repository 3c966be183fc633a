"""Real training on the embedded model: exact resume within a round and across rounds, both engines."""

import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from poetry_iter.core import UserError, read_json, root
from poetry_iter.engine import ModelSpec, open_engine, open_renderer
from poetry_iter.poems import load_poems
from poetry_iter.training import Training, prove, train

QUICK = Training(learning_rate=1e-3, learning_rate_end=5e-4, batch_size=4, micro_batch_size=2, lora_rank=4, saves=4)


@pytest.fixture(scope="module")
def examples():
    poems = sorted(load_poems(root() / "data/tiny_poems.jsonl")[0], key=lambda p: len(p.content))[:16]
    renderer = open_renderer(ModelSpec())[0]
    return [renderer.example("Salt and light.", p.title, p.content) for p in poems]


def weights(model):
    return {n: p.detach().clone() for n, p in model.model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_round_that_was_stopped_goes_on_exactly(tmp_path, examples, monkeypatch):
    "Stopped after its second save, a round ends with the very weights, optimizer and losses of one left alone."
    from transformers import TrainerCallback

    import poetry_iter.engines.lora as module

    alone = open_engine(ModelSpec())
    whole = train(alone, examples, tmp_path / "alone", QUICK)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    stopped, save_last = open_engine(ModelSpec()), module._save_last
    monkeypatch.setattr(module, "_save_last", Stop)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, examples, tmp_path / "stopped", QUICK)
    assert not (tmp_path / "stopped").exists() and (tmp_path / "stopped.work").exists()
    monkeypatch.setattr(module, "_save_last", save_last)
    again = open_engine(ModelSpec())
    resumed = train(again, examples, tmp_path / "stopped", QUICK)
    assert same(weights(alone), weights(again))
    tokens = [[h["num_tokens"] for h in read_json(tmp_path / d / "trainer_state.json")["log_history"] if "num_tokens" in h] for d in ("alone", "stopped")]
    assert tokens[0] == tokens[1] and tokens[0] == sorted(tokens[0])  # counted on, not anew
    assert resumed["losses"] == whole["losses"] and resumed["learning_rates"] == whole["learning_rates"]
    optimizers = [torch.load(tmp_path / d / "optimizer.pt", weights_only=True)["state"] for d in ("alone", "stopped")]
    assert all(torch.equal(optimizers[0][k]["exp_avg_sq"], optimizers[1][k]["exp_avg_sq"]) for k in optimizers[0])
    assert not (tmp_path / "stopped.work").exists()


def test_optimizer_and_schedule_go_on_across_rounds(tmp_path, examples):
    "Two rounds are one training: the second starts with the first one's moments and learning rate."
    model = open_engine(ModelSpec())
    one = train(model, examples[:8], tmp_path / "one", QUICK, total_steps=4)
    two = train(model, examples[8:], tmp_path / "two", QUICK, total_steps=4, previous=str(tmp_path / "one"))
    rates = [1e-3, 8.75e-4, 7.5e-4, 6.25e-4]
    assert [round(x, 9) for x in one["learning_rates"] + two["learning_rates"]] == rates
    steps = [torch.load(tmp_path / d / "optimizer.pt", weights_only=True)["state"][0]["step"].item() for d in ("one", "two")]
    assert steps == [2, 4]
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "made_with.json"):
        assert (tmp_path / "two" / name).exists(), name


def test_targets_are_never_cut(examples):
    renderer = open_renderer(ModelSpec())[0]
    longest = max(map(len, examples))
    kept, proof = prove(examples, renderer, longest - 1, names=[f"poem {i}" for i in range(len(examples))])
    assert len(kept) == len(examples) - len(proof["dropped"]) and proof["dropped"]
    assert all(e.targets[-1] == renderer.end for e in kept)
    with pytest.raises(UserError, match="nothing to train on"):
        prove(examples, renderer, 5)


def test_unsloth_trains_on_this_machine(tmp_path):
    "The same code with engine unsloth, in a process of its own, since unsloth patches the libraries: trains, saves, loads, goes on."
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed: pip install --no-deps unsloth unsloth_zoo")
    code = f"""
        import json
        import unsloth
        from poetry_iter.core import root
        from poetry_iter.engine import ModelSpec, Sampling, open_engine
        from poetry_iter.poems import load_poems
        from poetry_iter.training import Training, train
        from pathlib import Path
        folder = Path({str(tmp_path)!r})
        settings = Training(learning_rate=2e-3, learning_rate_end=1e-3, batch_size=4, micro_batch_size=4, lora_rank=4)
        poems = sorted(load_poems(root() / "data/tiny_poems.jsonl")[0], key=lambda p: len(p.content))[:8]
        base = ModelSpec(engine="unsloth", device="cpu", max_tokens=1024)
        lm = open_engine(base); r = lm.renderer
        examples = [r.example("Salt and light.", p.title, p.content) for p in poems]
        mean = lambda m: float(sum(a.sum() for a in m.token_losses(examples)) / sum(sum(e.mask) for e in examples))
        before = mean(lm)
        plain = mean(open_engine(ModelSpec()))
        train(lm, examples, folder / "one", settings, total_steps=4)
        one = mean(lm)
        again = open_engine(base.on(folder / "one"))
        loaded = mean(again)
        result = train(again, examples, folder / "two", settings, total_steps=4, previous=str(folder / "one"))
        said = again.sample([r.context("Salt.")], r.end, n=2, sampling=Sampling(max_new_tokens=8))
        print(json.dumps([plain, before, one, loaded, mean(again), result["checkpoint"]["step"], len(said[0])]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=root(), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, before, one, loaded, two, step, n = json.loads(done.stdout.strip().splitlines()[-1])
    assert abs(plain - before) < 1e-4  # both engines score alike
    assert one < before and two < one and abs(one - loaded) < 1e-4
    assert (step, n) == (4, 2)
