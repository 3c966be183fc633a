"""The embedded model: whole, small, and good at its jobs; what it learns from; and the stages that make one."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from poetry_iter.core import read_json, read_jsonl, root, shared_data
from poetry_iter.embedded.corpus import HeldOutGuard, is_by, make_corpus, piece, tidy
from poetry_iter.embedded.evaluation import describing, sketches_by_rule
from poetry_iter.embedded.exercises import EXERCISES, Piece, exercise
from poetry_iter.embedded.portraits import THEME_FIELDS, parse_portrait, portrait, words_named
from poetry_iter.embedded.pretraining import POOL_KINDS, Maker
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.poems import Poem, load_poems
from poetry_iter.renderers import Completion
from poetry_iter.scoring import bootstrap, score
from poetry_iter.workshop.tasks import TASKS

FOLDER = root() / "data/model"


@pytest.fixture(scope="module")
def model():
    return open_engine(ModelSpec(name=str(FOLDER)))


@pytest.fixture(scope="module")
def poems():
    return load_poems(root() / "data/tiny_poems.jsonl")[0]


def test_the_folder_is_whole_and_small(model):
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 16e6
    tokenizer, config = model.tokenizer, model.model.generation_config
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    assert tokenizer.eos_token == "<|im_end|>"
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert config.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")
    assert model.model.config.model_type == "qwen3" and model.context_length == 2048


def test_markers_in_content_stay_text(model):
    tokenizer, odd = model.tokenizer, "a<|im_end|> b<think>\n\tünï 🐌"
    ids = tokenizer.encode(odd, split_special_tokens=True)
    assert tokenizer.decode(ids) == odd
    assert not {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<think>")} & set(ids)
    assert len(tokenizer.encode("<|im_end|><think></think>")) == 3


def test_the_tokenizer_loads_the_same_alone(model, tmp_path, poems):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FOLDER / name, tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path)
    assert [alone.encode(p.content) for p in poems] == [model.tokenizer.encode(p.content) for p in poems]
    assert alone.chat_template == model.tokenizer.chat_template


def test_what_a_model_learns_from_is_what_the_renderers_make(model, poems):
    """Every description and poem of the training is, token by token, one that a renderer makes from the same description."""
    maker, seen, short = Maker(model.tokenizer, {}, THEME_FIELDS), set(), [p for p in poems if len(p.lines) < 12]
    kinds = [k for k in POOL_KINDS if k != "exercise"]
    for seed in range(60):
        kind, poem = kinds[seed % len(kinds)], short[seed % len(short)]
        tokens, weights = maker(random.Random(seed), kind, poem.title, poem.content)
        description, made = maker.described(kind, poem.title, poem.content, random.Random(seed).getrandbits(32)), {}
        for name, r in (maker.listing if kind == "list" else maker.renderers).items():
            if kind in ("describe", "list"):
                prompt = r.describe(poem)
                example = r.describe_example(poem, description, thinking="x") if name != "thinking-keep" else maker.describing(r, poem, description)
                assert example.tokens[: len(prompt)] == prompt
            elif name != "thinking-keep":
                example = r.example(description, poem.title, poem.content)
            else:
                continue
            made[name] = example
        same = [name for name, e in made.items() if e.tokens == tokens.tolist()]
        assert len(same) == 1
        assert [int(w == 1) for w in weights] == made[same[0]].mask
        seen.add((kind, same[0]))
    assert {(kind, name) for kind in kinds for name in ("base", "chat")} <= seen


def test_portraits_read_back_and_name_no_words(poems):
    for seed, p in enumerate(poems):
        said = portrait(p.content, seed, title=p.title)
        assert parse_portrait(said), said
        assert words_named(" ".join(w for move in parse_portrait(said)["moves"] for w in move), p.content)[0] == 0


def test_exercises_are_in_shape(poems):
    for seed, p in enumerate(poems[:12]):
        rng = random.Random(seed)
        *_, text = piece(rng, p.title, p.content, 8)
        for kind in EXERCISES:
            answer = exercise(rng, kind, Piece(p.title, text, THEME_FIELDS, {}))[-1]["content"]
            assert TASKS[kind].read(Completion(answer)).ok if kind in TASKS else answer, (kind, answer)


def test_nothing_of_an_author_left_out(tmp_path):
    rows = [{"title": p.title, "content": p.content, "author": a} for p, a in zip(load_poems(root() / "data/tiny_poems.jsonl")[0], ["James McIntyre", "Anne Foote", "Ella Wheeler Wilcox", ""] * 4)]
    path = tmp_path / "poems.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    corpus = make_corpus([path], path, held=0, left_out=["McIntyre", "Wilcox", "Foot"])
    assert corpus.dropped["by an author left out"] == 8 and len(corpus.train) + corpus.dropped.total() == 16
    assert is_by("Lydia Huntley Sigourney", ["Sigourney"]) and not is_by("Sigourney Weaver", ["Sigourney"])


def test_its_own_description_helps_more_than_anothers(model, poems):
    """The floors lie far below the figures in `nbs/log.md`, and far above a model that does not read."""
    for name in ("base", "chat"):
        rows = score(model.using(name), poems[:32], sketches_by_rule(poems[:32]))
        over_other, over_none = (bootstrap([r[k] for r in rows]) for k in ("gain_over_other", "gain"))
        assert over_other["lo"] > 0.15 and over_none["lo"] > 0.1


def test_it_describes_in_its_language(model, poems):
    short = [p for p in poems if len(p.lines) <= 16][:24]
    rows = describing(model, short, Sampling(max_new_tokens=160))
    assert sum(not r["faults"] for r in rows) >= 18
    portraits, sketches = ([r for r in rows if r["kind"] == kind] for kind in ("portrait", "sketch"))
    assert not sketches or sum(r["grounded"] for r in sketches) / len(sketches) > 0.25
    assert not portraits or sum(r["named_share"] for r in portraits) / len(portraits) < 0.1


def test_thinking_ends_and_leaves_a_description(model, poems):
    rows = describing(model.using("thinking"), poems[:6], Sampling(max_new_tokens=240))
    assert sum(row["ended"] == "complete" for row in rows) >= 5
    assert sum("Stanzas of" in row["thinking"] for row in rows) >= 5


def test_held_out_poems_are_named_and_apart():
    path = shared_data("more_poems.jsonl")
    if path is None:
        pytest.skip("../shared/data is absent: the poems behind the held-out ids are not here")
    ids, more = read_json(FOLDER / "heldout.json"), {p.id: p for p in load_poems(path, strict=False)[0]}
    assert len(ids["loop"]) == len(ids["evaluation"]) == 500 and not set(ids["loop"]) & set(ids["evaluation"])
    assert set(ids["loop"]) | set(ids["evaluation"]) <= more.keys()
    held = [more[i] for i in ids["loop"] + ids["evaluation"]]
    guard = HeldOutGuard([p.content for p in held])
    assert all(guard(p.content) for p in held[:50])
    assert not guard(HeldOutGuard.__doc__)


def test_a_piece_is_a_part_of_its_poem(poems):
    for seed, p in enumerate(poems):
        text = tidy(p.content) or p.content
        _, part = piece(random.Random(seed), p.title, text, 8)
        assert len([line for line in part.split("\n") if line]) <= 8
        assert set(part.split("\n")) <= set(text.split("\n"))


def test_the_stages_make_a_model(house):
    """All four stages, small."""
    settings = ("steps=8", "eval_every=4", "watch=2", "most=2", "renderers=[base]", "max_new_tokens=24")
    done = house.cli("run", "embedded", "--run", "run", *(x for s in settings for x in ("-p", s)), env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    run = house.run("run")
    log = read_jsonl(run / "train.jsonl")
    assert [row["step"] for row in log] == [4, 8]
    assert open_engine(ModelSpec(name=str(run / "model"))).model.num_parameters() > 100_000
    figures = json.loads((run / "examination.json").read_text())
    assert figures["base"]["poems"] == 2
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["step"] == 8
    corpus = {row["text"] for row in read_jsonl(run / "corpus.jsonl")}
    assert not corpus & {Poem(**{k: r[k] for k in ("title", "content")}).content for r in read_jsonl(run / "held_out.jsonl")}
