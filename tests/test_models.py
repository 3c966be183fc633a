"""Scores and samples do not depend on the batch, on the CPU and on the embedded model."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from poetry_iter.core import UserError, read_json, root, write_json
from poetry_iter.engine import ModelSpec, Sampling, open_engine, require
from poetry_iter.engines.transformers import Transformers, choose
from poetry_iter.engines.weights import ADAPTER, check_adapter, check_model_folder, model_hash
from poetry_iter.poems import load_poems
from poetry_iter.renderers import Example


@pytest.fixture(scope="module")
def lm():
    return open_engine(ModelSpec())


@pytest.fixture(scope="module")
def poems():
    return load_poems(root() / "data/tiny_poems.jsonl")[0][:12]


@pytest.mark.parametrize("name", ["base", "chat"])
def test_losses_do_not_move_with_the_batch(lm, poems, name):
    renderer = lm.using(name).renderer
    examples = [renderer.example(d, p.title, p.content) for p in poems for d in (None, "Sea, wind and salt.")]
    one, eight = lm.token_losses(examples, batch_size=1), lm.token_losses(examples, batch_size=8)
    assert max(abs(a.mean() - b.mean()) for a, b in zip(one, eight)) < 1e-5
    assert all(len(a) == sum(e.mask) for a, e in zip(one, examples))
    chunked = lm.token_losses(examples, head_rows=3)
    assert max(np.abs(a - b).max() for a, b in zip(one, chunked)) < 1e-4


def test_losses_by_hand(lm, poems):
    "A loop over log-probabilities; targets in the middle of the sequence too, and a mask on the first token, which nothing predicts."
    tokens = lm.using("base").renderer.example("Salt.", poems[0].title, poems[0].content).tokens[:60]
    rng = np.random.default_rng(0)
    for _ in range(3):
        mask = rng.integers(0, 2, len(tokens)).tolist()
        with torch.no_grad():
            logp = lm.model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        hand = [-float(logp[t - 1, tokens[t]]) for t in range(1, len(tokens)) if mask[t]]
        assert np.allclose(lm.token_losses([Example(tokens, mask)])[0], hand, atol=1e-4)


def test_the_whole_batch_never_meets_the_vocabulary(lm, poems, monkeypatch):
    "The output embeddings see at most `head_rows` positions at a time."
    head, seen = lm.lm.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].shape[-1]))
    renderer = lm.renderer
    lm.token_losses([renderer.example(None, p.title, p.content) for p in poems], head_rows=64)
    handle.remove()
    assert max(seen) <= 64 and sum(seen) > 500


def test_a_sample_does_not_depend_on_its_batch(lm, poems):
    renderer = lm.renderer
    prompts, few = [renderer.describe(p) for p in poems], Sampling(max_new_tokens=24)
    together = lm.sample(prompts, renderer.end, n=3, sampling=few)
    for i in (0, 5, 11):
        alone = lm.sample([prompts[i]], renderer.end, n=3, sampling=few, seeds=[i])[0]
        assert [c.tokens for c in alone] == [c.tokens for c in together[i]]
    one = lm.sample([prompts[0]], renderer.end, n=1, sampling=few, seeds=[0])[0]
    assert one[0].tokens == together[0][0].tokens  # nor on how many samples stand beside it


def test_sampling_follows_the_distribution():
    "Inversion of the cumulative distribution gives back the probabilities, cut by top-k and top-p."
    p = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    u = torch.linspace(0, 1, 20001)[:-1]
    draw = lambda **kw: torch.bincount(choose(Sampling(temperature=1.0, **kw), p.log().expand(len(u), -1), u), minlength=5) / len(u)
    assert torch.allclose(draw(top_p=1.0, top_k=0), p, atol=1e-3)
    assert torch.allclose(draw(top_p=1.0, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]), atol=1e-3)
    assert torch.allclose(draw(top_p=0.7, top_k=0), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]), atol=1e-3)
    assert choose(Sampling(temperature=0), p.log()[None], u[:1]).item() == 0


def test_generation_ends(lm, poems):
    renderer = lm.renderer
    for [c] in lm.sample([renderer.context(None)] * 8, renderer.end, sampling=Sampling(max_new_tokens=40), seeds=list(range(8))):
        assert (c.ended == "stop") == (c.tokens[-1] == renderer.end) and len(c.tokens) <= 40
        assert renderer.end not in c.tokens[:-1]


def test_other_families_are_scored_too():
    "Families that cap or scale their logits, made in memory: scores agree with the model's own loss."
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, LlamaConfig

    tokenizer = open_engine(ModelSpec()).tokenizer
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
    configs = [LlamaConfig(**small), CohereConfig(**small, logit_scale=0.25), Gemma2Config(**small, head_dim=8, final_logit_softcapping=2.0),
               GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)]
    tokens = list(range(40, 72))
    for config in configs:
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(config).eval()
        for p in net.parameters():
            p.data.mul_(4.0)  # away from the flat distribution of a fresh model
        ours = Transformers(ModelSpec(name="in-memory"), net, tokenizer).token_losses([Example(tokens, [1] * len(tokens))])[0]
        with torch.no_grad():
            theirs = net(input_ids=torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
        assert abs(ours.mean() - float(theirs)) < 1e-4, type(net).__name__
        out = Transformers(ModelSpec(name="in-memory"), net, tokenizer).sample([tokens, tokens[:9]], end=1, n=2, sampling=Sampling(max_new_tokens=5))
        assert [len(x) for x in out] == [2, 2]


def test_a_folder_without_weights_or_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        check_model_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no tokenizer"):
        open_engine(ModelSpec(name=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a safetensors file"):
        open_engine(ModelSpec(name=str(tmp_path)))


def test_a_sequence_over_the_context(lm):
    with pytest.raises(UserError, match="longer than the context"):
        lm.token_losses([Example([5] * 5000, [1] * 5000)])


# ------------------------------------------------------------------ adapters are not believed


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    "An adapter on the model that ships, saved as a training leaves it."
    from poetry_iter.engines.weights import adapter_hash
    from poetry_iter.training import Training

    folder, lm = tmp_path_factory.mktemp("adapter") / "a", open_engine(ModelSpec())
    lm.fresh(Training(lora_rank=4)).save_pretrained(folder)
    write_json(folder / "made_with.json", {"base": "data/model", "base_hash": model_hash("data/model"), "renderer": "chat", "weights": adapter_hash(folder)})
    return folder


@pytest.fixture
def copied(adapter, tmp_path):
    "A copy to be spoilt."
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def respell(folder, change):
    "Change the tensors of an adapter that does not say what its weights were."
    from safetensors.numpy import load_file, save_file

    save_file(change(load_file(folder / ADAPTER)), folder / ADAPTER)
    write_json(folder / "made_with.json", {k: v for k, v in read_json(folder / "made_with.json").items() if k != "weights"})


def test_a_whole_adapter_is_loaded(adapter):
    assert check_adapter(adapter, "data/model", "chat")["renderer"] == "chat"
    assert open_engine(ModelSpec(adapter=str(adapter))).identity.split()[0] == model_hash("data/model")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / ADAPTER).unlink(), "copy the checkpoint again"),
        (lambda f: (f / ADAPTER).write_bytes(b""), "not a safetensors file"),
        (lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:9000]), "cut off"),
        (lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:-4] + b"\0\0\1\0"), "not what was saved"),
        (lambda f: respell(f, lambda w: {k: np.full_like(v, np.nan) for k, v in w.items()}), "no number"),
        (lambda f: respell(f, lambda w: {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in w.items()}), "has rank 2"),
        (lambda f: respell(f, lambda w: {k: v for k, v in w.items() if "lora_B" not in k}), "is missing or does not fit"),
        (lambda f: respell(f, lambda w: {k.replace("layers.3", "layers.9"): v for k, v in w.items()}), "none of data/model, as model.layers.9"),
        (lambda f: respell(f, lambda w: {k: np.concatenate([v, v], 1) if "q_proj.lora_A" in k else v for k, v in w.items()}), "none of data/model, as model.layers.0"),
        (lambda f: write_json(f / "made_with.json", {**read_json(f / "made_with.json"), "base_hash": "0" * 16}), "made on the base model"),
        (lambda f: write_json(f / "adapter_config.json", {**read_json(f / "adapter_config.json"), "r": "four"}), "its adapter_config.json says four"),
    ],
)
def test_a_spoilt_adapter_is_refused(copied, spoil, said):
    spoil(copied)
    with pytest.raises(UserError, match=re.escape(said)):
        open_engine(ModelSpec(adapter=str(copied)))


def test_an_adapter_of_another_renderer_or_base(adapter, copied):
    with pytest.raises(UserError, match="made with the renderer 'chat', asked for with 'base'"):
        open_engine(ModelSpec(adapter=str(adapter), renderer="base"))
    with pytest.raises(UserError, match="made on the base model data/model"):
        check_adapter(adapter, "Qwen/Qwen3-8B", "chat")
    (copied / "made_with.json").unlink()  # one from elsewhere: peft's own config says whose it is
    config = read_json(copied / "adapter_config.json")
    write_json(copied / "adapter_config.json", {**config, "base_model_name_or_path": "Qwen/Qwen3-8B"})
    with pytest.raises(UserError, match="made on the base model Qwen/Qwen3-8B, not on data/model"):
        check_adapter(copied, "data/model")
    write_json(copied / "adapter_config.json", {**config, "base_model_name_or_path": "data/model"})
    assert check_adapter(copied, "data/model") == {}


def test_a_base_changed_in_the_middle_of_its_file(copied, tmp_path):
    "The hash reads every byte; one of before, which read the ends, is recognised once and made new."
    from poetry_iter.engines.weights import _hash_of_ends

    base = tmp_path / "base"
    shutil.copytree(root() / "data/model", base)
    facts = read_json(copied / "made_with.json")
    write_json(copied / "made_with.json", {**facts, "base_hash": _hash_of_ends(base)})
    assert check_adapter(copied, base)["base_hash"] == _hash_of_ends(base)
    assert read_json(copied / "made_with.json")["base_hash"] == model_hash(base) == facts["base_hash"]
    with open(base / "model.safetensors", "r+b") as f:
        f.seek(4_000_000)
        f.write(b"\1\2\3\4")
    with pytest.raises(UserError, match="made on the base model"):
        check_adapter(copied, base)


def test_what_an_engine_cannot_do_is_refused_before(monkeypatch):
    with pytest.raises(UserError, match="choose one of transformers"):
        ModelSpec(engine="jax")
    with pytest.raises(UserError, match="load_in_4bit needs engine: unsloth"):
        ModelSpec(load_in_4bit=True)
    with pytest.raises(UserError, match="QLoRA needs one that load_in_4bit; unsloth can"):
        require("transformers", "load_in_4bit", what="QLoRA")
