"""The forward of our own says what transformers says: the same samples but for ties, the same losses whatever the batch is, and it leaves strange models alone."""

import numpy as np
import pytest
import torch

from poetry_iter.core import root
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.engines.forward import Forward, forward_of
from poetry_iter.engines.transformers import Transformers
from poetry_iter.poems import load_poems
from poetry_iter.training import Training


@pytest.fixture(scope="module", params=["base", "adapter"])
def lm(request):
    engine = open_engine(ModelSpec())
    if request.param == "adapter":
        engine.model = engine.fresh(Training(lora_rank=4)).eval()
        torch.manual_seed(0)
        for name, p in engine.model.named_parameters():
            if "lora_B" in name: torch.nn.init.normal_(p, std=0.02)
    return engine


@pytest.fixture(scope="module")
def poems():
    return load_poems(root() / "data/tiny_poems.jsonl")[0][:8]


def samples(lm, prompts, n, **kw):
    return [c.tokens for said in lm.sample(prompts, lm.renderer.end, n, Sampling(max_new_tokens=110), **kw) for c in said]


@pytest.mark.parametrize("n", [1, 2])
def test_samples_are_those_of_transformers(lm, poems, monkeypatch, n):
    "Long enough that rows end and leave, one after another."
    prompts = [lm.renderer.describe(p) for p in poems]
    assert isinstance(lm.forward, Forward)
    ours, crowded = samples(lm, prompts, n), samples(lm, prompts, n, tokens_per_batch=1500)
    assert len({len(t) for t in ours}) > len(prompts) // 2
    monkeypatch.setattr(Transformers, "forward", None)
    theirs = samples(lm, prompts, n)
    assert sum(a != b for a, b in zip(ours, theirs)) <= 1 and sum(a != b for a, b in zip(ours, crowded)) <= 1  # ties within 1e-5


def test_losses_do_not_move_with_the_batch(lm, poems, monkeypatch):
    examples = [lm.renderer.example("Sea and salt.", p.title, p.content) for p in poems]
    one, eight, packed = (lm.token_losses(examples, batch_size=b) for b in (1, 8, None))
    monkeypatch.setattr(Transformers, "forward", None)
    theirs = lm.token_losses(examples)
    for a, b, c, d in zip(one, eight, packed, theirs):
        assert len(a) == len(d) and abs(float(a.mean() - b.mean())) < 1e-5 and abs(float(a.mean() - c.mean())) < 1e-5
        np.testing.assert_allclose(a, d, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_which_models_are_known(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=64)
    more = {"gpt2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64), "mistral": sizes | dict(sliding_window=4)}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more.get(kind, sizes))).eval()
    assert (forward_of(lm) is None) == (kind in more)
