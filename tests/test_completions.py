"""The engine of somebody else's server: vLLM's protocol by a server of ours that answers by the embedded model, and llama.cpp's own server with the model as GGUF."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from completions_server import serve

from poetry_iter.core import UserError, root, seed_of
from poetry_iter.engine import ModelSpec, Sampling, open_engine, require
from poetry_iter.engines.completions import Completions
from poetry_iter.engines.transformers import Transformers
from poetry_iter.poems import load_poems
from poetry_iter.training import Training, train

SHORT = Sampling(max_new_tokens=12)
POEMS = load_poems(root() / "data/tiny_poems.jsonl")[0][:6]


@pytest.fixture(scope="module")
def here():
    return open_engine(ModelSpec())


@pytest.fixture(scope="module")
def server(here):
    with serve(engine=here) as server:
        yield server


def connect(server, tmp_path=None, **settings):
    return Completions(ModelSpec(engine="completions", base_url=f"{server.url}#{server.name}"), record=tmp_path, **settings)


def prompts_of(lm):
    return [lm.renderer.describe(p) for p in POEMS]


def test_it_says_and_scores_what_the_model_here_does(server, here):
    lm = connect(server)
    assert lm.dialect.ids and lm.dialect.many and lm.dialect.scores == "prompt_logprobs" and lm.can.scores and lm.can.trains and not lm.can.exact
    examples = [here.renderer.example(d, p.title, p.content) for p in POEMS for d in ("A gate in rain.", None)]
    theirs, ours = lm.token_losses(examples), here.token_losses(examples)
    assert [x.dtype for x in theirs] == [np.float32] * len(examples)
    assert max(abs(a - b).max() for a, b in zip(theirs, ours)) < 1e-4
    said = lm.sample(prompts_of(lm), lm.renderer.end, n=3, sampling=SHORT, seeds=range(9, 15))
    same = here.sample(prompts_of(lm), lm.renderer.end, n=3, sampling=SHORT, seeds=[seed_of(s) % 2**31 for s in range(9, 15)])
    assert [[(c.text, c.ended, c.tokens) for c in row] for row in said] == [[(c.text, c.ended, c.tokens) for c in row] for row in same]
    greedy = lm.sample(prompts_of(lm)[:1], lm.renderer.end, n=2, sampling=replace(SHORT, temperature=0))
    assert greedy[0][0] == greedy[0][1]


def test_text_alone_one_sample_a_call_and_echo(here):
    with serve(engine=here, ids=False, n=False, prompt_logprobs=False, tokenize=False, token_ids=False, lora=False) as poor:
        lm = connect(poor)
        assert (lm.dialect.ids, lm.dialect.many, lm.dialect.scores, lm.can.trains) == (False, False, "echo", False)
        examples = [here.renderer.example("A gate in rain.", p.title, p.content) for p in POEMS[:2]]
        assert max(abs(a - b).max() for a, b in zip(lm.token_losses(examples), here.token_losses(examples))) < 1e-4
        [row] = lm.sample(prompts_of(lm)[:1], lm.renderer.end, n=3, sampling=SHORT, seeds=[5])
        seeds = [b["seed"] for b in poor.seen[-3:]]
        assert sorted(seeds) == sorted(seed_of(5, j) % 2**31 for j in range(3)) and len(row) == 3
        with pytest.raises(UserError, match="takes no tokens, and as a text"):  # in the poem it is text, and in a prompt of text the end
            lm.token_losses([here.renderer.example("A gate <|im_end|> in rain.", "Gate", "It stood.")])
        with pytest.raises(UserError, match=r"needs one that trains; transformers or .*it loads no adapters while it runs"):
            require(lm, "trains", what="a plan")


def test_numbers_that_are_off_are_found_out(here):
    with serve(engine=here, prompt_logprobs=False) as off:
        off.shift = 1
        lm = connect(off)
        assert not lm.can.scores
        with pytest.raises(UserError, match=r"cannot score: its log-probabilities of tokens in a prompt are \d+\.\d\d nats from those"):
            lm.token_losses([here.renderer.example(None, "Gate", "It stood.")])
        with pytest.raises(UserError, match=r"needs one that scores"):
            require(lm, "scores", what="a plan")


def test_fewer_log_probabilities_than_tokens(server, here):
    lm = connect(server)
    server.fewer = 1
    try:
        with pytest.raises(UserError, match=r"\d+ log-probabilities for a prompt of \d+ tokens; it cannot score this one"):
            lm.token_losses([here.renderer.example("Fewer.", "Gate", "It stood.")])
    finally:
        server.fewer = 0


def test_nothing_is_asked_twice(server, here, tmp_path):
    "A call that breaks off keeps what was answered; the next one, in another process or this, asks for the rest."
    lm = connect(server, tmp_path, at_once=2, tries=1)
    examples = [here.renderer.example("Kept.", p.title, p.content) for p in POEMS]
    server.faults.extend([None, None, None, "500"])
    asked = len(server.seen)
    with pytest.raises(UserError, match=r"no answer in 1 attempts .500: as the test asked.; what was answered is kept: run again"):
        lm.token_losses(examples)
    server.faults.clear()
    [file] = tmp_path.glob("*.jsonl")
    kept = len(file.read_text().splitlines())
    assert 3 <= kept < len(examples)
    with open(file, "a") as f:
        f.write('{"key": "cut by a kill')
    again, asked = connect(server, tmp_path), len(server.seen)
    losses = again.token_losses(examples)
    probes = [b for b in server.seen[asked:] if b.get("prompt_logprobs") is not None and list(b["prompt"]) in [e.tokens for e in examples]]
    assert len(probes) == len(examples) - kept
    assert max(abs(a - b).max() for a, b in zip(losses, here.token_losses(examples))) < 1e-4
    asked = len(server.seen)
    assert all((a == b).all() for a, b in zip(again.token_losses(examples), losses)) and len(server.seen) == asked


def test_many_in_flight_under_a_bound(server):
    lm = connect(server, at_once=3)
    server.delay, server.most_at_once = 0.05, 0
    try:
        lm.sample(prompts_of(lm), lm.renderer.end, sampling=SHORT, seeds=range(50, 56))
    finally:
        server.delay = 0.0
    assert server.most_at_once == 3


@pytest.mark.parametrize("fault", ["429", "503", "500", "cut", "page"])
def test_a_fault_that_passes(server, fault, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda a, b: 0.05)  # our own pauses
    lm = connect(server)
    server.faults.append(fault)
    said = lm.sample(prompts_of(lm)[:2], lm.renderer.end, sampling=SHORT)
    assert len(said) == 2 and not server.faults


def test_a_slow_server(server):
    lm = connect(server, seconds=0.5, tries=1)
    server.delay = 1.5
    try:
        with pytest.raises(UserError, match=r"no answer in 1 attempts .connection: Request timed out"):
            lm.sample(prompts_of(lm)[:1], lm.renderer.end, sampling=SHORT, seeds=[99])
    finally:
        time.sleep(1.2)
        server.delay = 0.0


def test_what_only_a_person_can_mend(server, tmp_path):
    spec = lambda url, **kw: ModelSpec(engine="completions", base_url=url, **kw)
    with pytest.raises(UserError, match=r"it has no model poet, but embedded; say which is meant: base_url=http://127.0.0.1:\d+/v1#NAME"):
        open_engine(spec(f"{server.url}#poet"))
    with pytest.raises(UserError, match=r"it has no model data/model, but embedded"):
        open_engine(spec(server.url))
    with pytest.raises(UserError, match=r"cannot be reached .connection"):
        open_engine(spec("http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match=r"no address; expected one as"):
        open_engine(spec("localhost:8000"))
    with pytest.raises(UserError, match=r"say base_url"):
        open_engine(spec(""))
    with pytest.raises(UserError, match=r"adapter nobody: no folder here, and server .* has none of that name, but embedded"):
        open_engine(spec(f"{server.url}#embedded", adapter="nobody"))
    lm = connect(server)
    server.faults.append("401")
    with pytest.raises(UserError, match=r"the key is wrong"):
        lm.sample(prompts_of(lm)[:1], lm.renderer.end, sampling=SHORT, seeds=[77])
    with pytest.raises(UserError, match=r"leaves no room in the context of embedded"):
        lm.sample([[5] * 3000], lm.renderer.end)


def test_another_tokenizer_is_found_before_the_first_score(server, here, monkeypatch):
    seen = len(server.seen)
    monkeypatch.setattr(server, "encode", lambda text: [t + (t == 19) for t in here.tokenizer.encode(text, add_special_tokens=False)])
    with pytest.raises(UserError, match=r"its tokenizer is not that of .*data/model: 'Salt.* is .* there and .* here; name the model that it serves"):
        connect(server)
    assert len(server.seen) == seen  # no completion was asked for


def test_a_server_of_which_only_the_number_of_tokens_is_known(here, monkeypatch):
    with serve(engine=here, tokenize=False, ids=False) as less:
        monkeypatch.setattr(
            less,
            "encode",
            lambda text: (
                [7, *here.tokenizer.encode(text, add_special_tokens=False)]
                if "sea" in text
                else here.tokenizer.encode(text, add_special_tokens=False)
            ),
        )
        with pytest.raises(UserError, match=r"its tokenizer is not that of"):
            connect(less)


def test_it_trains_here_and_asks_there(server, here, tmp_path):
    lm = connect(server)
    examples = [here.renderer.example("Salt and light.", p.title, p.content) for p in POEMS[:4]]
    before = np.concatenate(lm.token_losses(examples)).mean()
    result = train(lm, examples, tmp_path / "one", Training(learning_rate=3e-3, batch_size=2, micro_batch_size=2, lora_rank=4, saves=1))
    assert lm.model.startswith("poetry-iter-") and lm.model in server.engines and result["checkpoint"]["engine"] == "transformers"
    losses = lm.token_losses(examples)
    assert np.concatenate(losses).mean() < before - 0.05
    local = open_engine(ModelSpec().on(tmp_path / "one"))
    assert max(abs(a - b).max() for a, b in zip(losses, local.token_losses(examples))) < 1e-3
    again = open_engine(ModelSpec(engine="completions", base_url=f"{server.url}#embedded").on(tmp_path / "one"))
    assert again.model == lm.model and again.identity == lm.identity != connect(server).identity


# ------------------------------------------------------------------ llama.cpp's own server

LLAMA = next((p for p in (os.environ.get("LLAMA_PYTHON"), str(root().parent / "venv-completions/bin/python"), sys.executable) if p and Path(p).exists()
              and not subprocess.run([p, "-c", "import llama_cpp.server.app, gguf"], capture_output=True).returncode), None) if os.environ.get("SLOW") else None  # fmt: skip
GGUF = """
import json, sys
from pathlib import Path
import gguf
from safetensors.torch import load_file
folder, out, bos = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
c, t = (json.loads((folder / f).read_text()) for f in ("config.json", "tokenizer.json"))
w = gguf.GGUFWriter(out, "qwen3")
w.add_context_length(c["max_position_embeddings"]); w.add_embedding_length(c["hidden_size"]); w.add_block_count(c["num_hidden_layers"])
w.add_feed_forward_length(c["intermediate_size"]); w.add_head_count(c["num_attention_heads"]); w.add_head_count_kv(c["num_key_value_heads"])
w.add_key_length(c["head_dim"]); w.add_value_length(c["head_dim"]); w.add_layer_norm_rms_eps(c["rms_norm_eps"]); w.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
added = {a["content"]: a["id"] for a in t["added_tokens"]}
names = sorted({**t["model"]["vocab"], **added}.items(), key=lambda x: x[1])
w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("qwen2"); w.add_token_list([n for n, _ in names])
w.add_token_types([gguf.TokenType.CONTROL if n in added else gguf.TokenType.NORMAL for n, _ in names])
w.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in t["model"]["merges"]])
w.add_eos_token_id(added["<|im_end|>"]); w.add_pad_token_id(added["<|pad|>"]); w.add_add_bos_token(False)
if bos != "as is": w.add_bos_token_id(int(bos))
where = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, c["num_hidden_layers"])
for n, x in load_file(folder / "model.safetensors").items():
    if n != "lm_head.weight": w.add_tensor(where.get_name(n, try_suffixes=(".weight",)), x.float().numpy())
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
"""


@pytest.fixture
def llama(tmp_path):
    "A server of llama.cpp with the embedded model; `bos`: the token that its file calls the beginning."
    if not LLAMA:
        pytest.skip("llama-cpp-python with its server, and gguf: SLOW=1 LLAMA_PYTHON=a python that has them")
    started, env = [], {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def start(bos):
        file = tmp_path / f"{bos}.gguf"
        subprocess.run([LLAMA, "-c", GGUF, str(root() / "data/model"), str(file), str(bos)], check=True, env=env)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [
            LLAMA,
            "-m",
            "llama_cpp.server",
            "--model",
            str(file),
            "--n_ctx",
            "2048",
            "--logits_all",
            "true",
            "--n_threads",
            "1",
            "--n_threads_batch",
            "1",
            "--port",
            str(port),
            "--model_alias",
            "poet",
        ]
        with open(tmp_path / f"{bos}.log", "w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
        end = time.monotonic() + 180
        while time.monotonic() < end and started[-1].poll() is None:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}/v1#poet"
            time.sleep(0.3)
        pytest.fail((tmp_path / f"{bos}.log").read_text()[-500:])

    yield start
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(tmp_path)


def test_llama_cpp_as_it_is_cannot_score(llama):
    lm = open_engine(ModelSpec(engine="completions", base_url=llama("as is")))
    assert not lm.can.scores and not lm.dialect.ids and not lm.dialect.many and "cannot score" in lm.dialect.why
    assert len(lm.sample(prompts_of(lm)[:1], lm.renderer.end, n=2, sampling=SHORT)[0]) == 2


def test_llama_cpp_with_the_prompts_first_token_as_its_beginning(llama, here):
    lm = Completions(ModelSpec(engine="completions", base_url=llama(prompts_of(here)[0][0])), record=None)
    assert lm.can.scores and lm.dialect.scores == "echo"
    examples = [here.renderer.example("A gate in rain.", p.title, p.content) for p in POEMS[:3]]
    theirs, ours = lm.token_losses(examples), here.token_losses(examples)
    apart = [abs(a.mean() - b.mean()) for a, b in zip(theirs, ours)]
    print(json.dumps([float(x) for x in apart]))
    assert max(apart) < 0.001
    greedy = replace(SHORT, temperature=0)
    assert [c.tokens for [c] in lm.sample(prompts_of(lm)[:3], lm.renderer.end, sampling=greedy)] == [
        c.tokens for [c] in here.sample(prompts_of(lm)[:3], lm.renderer.end, sampling=greedy)
    ]
    assert isinstance(here, Transformers)
