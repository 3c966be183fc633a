"""Scores and samples do not depend on the batch, on the CPU and on the embedded model."""

import numpy as np
import pytest
import torch

from poetry_iter.core import UserError, check_model_folder, root
from poetry_iter.engines.transformers import Sampling, generate, load_model, token_losses
from poetry_iter.poems import load_poems
from poetry_iter.renderers import Example


@pytest.fixture(scope="module")
def model():
    return load_model(root() / "data/model")


@pytest.fixture(scope="module")
def poems():
    return load_poems(root() / "data/tiny_poems.jsonl")[0][:12]


@pytest.mark.parametrize("name", ["base", "chat"])
def test_losses_do_not_move_with_the_batch(model, poems, name):
    renderer = model.renderer(name)
    examples = [renderer.example(d, p.title, p.content) for p in poems for d in (None, "Sea, wind and salt.")]
    one, eight = token_losses(model, examples, batch_size=1), token_losses(model, examples, batch_size=8)
    assert max(abs(a.mean() - b.mean()) for a, b in zip(one, eight)) < 1e-5
    assert all(len(a) == sum(e.mask) for a, e in zip(one, examples))
    chunked = token_losses(model, examples, head_rows=3)
    assert max(np.abs(a - b).max() for a, b in zip(one, chunked)) < 1e-4


def test_losses_by_hand(model, poems):
    "A loop over log-probabilities; targets in the middle of the sequence too, and a mask on the first token, which nothing predicts."
    tokens = model.renderer("base").example("Salt.", poems[0].title, poems[0].content).tokens[:60]
    rng = np.random.default_rng(0)
    for _ in range(3):
        mask = rng.integers(0, 2, len(tokens)).tolist()
        with torch.no_grad():
            logp = model.model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        hand = [-float(logp[t - 1, tokens[t]]) for t in range(1, len(tokens)) if mask[t]]
        assert np.allclose(token_losses(model, [Example(tokens, mask)])[0], hand, atol=1e-4)


def test_the_whole_batch_never_meets_the_vocabulary(model, poems, monkeypatch):
    "The output embeddings see at most `head_rows` positions at a time."
    head, seen = model.lm.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].shape[-1]))
    renderer = model.renderer("chat")
    token_losses(model, [renderer.example(None, p.title, p.content) for p in poems], head_rows=64)
    handle.remove()
    assert max(seen) <= 64 and sum(seen) > 500


def test_a_sample_does_not_depend_on_its_batch(model, poems):
    renderer = model.renderer("chat")
    prompts, few = [renderer.describe(p) for p in poems], Sampling(max_new_tokens=24)
    together = generate(model, prompts, renderer.end, n=3, sampling=few)
    for i in (0, 5, 11):
        alone = generate(model, [prompts[i]], renderer.end, n=3, sampling=few, seeds=[i])[0]
        assert [c.tokens for c in alone] == [c.tokens for c in together[i]]
    one = generate(model, [prompts[0]], renderer.end, n=1, sampling=few, seeds=[0])[0]
    assert one[0].tokens == together[0][0].tokens  # nor on how many samples stand beside it


def test_sampling_follows_the_distribution():
    "Inversion of the cumulative distribution gives back the probabilities, cut by top-k and top-p."
    p = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    u = torch.linspace(0, 1, 20001)[:-1]
    draw = lambda **kw: torch.bincount(Sampling(temperature=1.0, **kw).choose(p.log().expand(len(u), -1), u), minlength=5) / len(u)
    assert torch.allclose(draw(top_p=1.0, top_k=0), p, atol=1e-3)
    assert torch.allclose(draw(top_p=1.0, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]), atol=1e-3)
    assert torch.allclose(draw(top_p=0.7, top_k=0), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]), atol=1e-3)
    assert Sampling(temperature=0).choose(p.log()[None], u[:1]).item() == 0


def test_generation_ends(model, poems):
    renderer = model.renderer("chat")
    for [c] in generate(model, [renderer.context(None)] * 8, renderer.end, sampling=Sampling(max_new_tokens=40), seeds=list(range(8))):
        assert (c.ended == "stop") == (c.tokens[-1] == renderer.end) and len(c.tokens) <= 40
        assert renderer.end not in c.tokens[:-1]


def test_other_families_are_scored_too():
    "Families that cap or scale their logits, made in memory: scores agree with the model's own loss."
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, LlamaConfig

    from poetry_iter.engines.transformers import Model

    tokenizer = load_model(root() / "data/model").tokenizer
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
    configs = [LlamaConfig(**small), CohereConfig(**small, logit_scale=0.25), Gemma2Config(**small, head_dim=8, final_logit_softcapping=2.0),
               GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)]
    tokens = list(range(40, 72))
    for config in configs:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config).eval()
        for p in lm.parameters():
            p.data.mul_(4.0)  # away from the flat distribution of a fresh model
        ours = token_losses(Model(lm, tokenizer, "in memory"), [Example(tokens, [1] * len(tokens))])[0]
        with torch.no_grad():
            theirs = lm(input_ids=torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
        assert abs(ours.mean() - float(theirs)) < 1e-4, type(lm).__name__
        out = generate(Model(lm, tokenizer, "in memory"), [tokens, tokens[:9]], end=1, n=2, sampling=Sampling(max_new_tokens=5))
        assert [len(x) for x in out] == [2, 2]


def test_a_folder_without_weights_or_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        check_model_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no tokenizer"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_model(tmp_path)


def test_a_sequence_over_the_context(model):
    with pytest.raises(UserError, match="longer than the context"):
        token_losses(model, [Example([5] * 5000, [1] * 5000)])
