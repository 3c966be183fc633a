"""The engine tinker: what can be said without a service, and one round of the loop against the open server.

The slow part needs the environment of `make tinker-server` and, in the Python that runs it, the extra `tinker`:
    SLOW=1 python -m pytest tests/test_tinker.py
"""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from poetry_iter.core import UserError, read_jsonl, root
from poetry_iter.engine import ModelSpec, open_engine, open_renderer, spec_of
from poetry_iter.pipeline.plans import plan_run
from poetry_iter.poems import load_poems
from poetry_iter.training import Training, train

ROOT = root()
SERVER_PYTHON = Path(os.environ.get("TINKER_SERVER_PYTHON", ROOT / ".tinker-venv/bin/python"))
client = pytest.mark.skipif(importlib.util.find_spec("tinker") is None, reason="the client is not installed: pip install 'poetry_iter[tinker]'")
slow = [client, pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="some minutes, and an open server: set SLOW=1"),
        pytest.mark.skipif(not SERVER_PYTHON.exists(), reason=f"no {SERVER_PYTHON}: make tinker-server makes it")]


def test_a_run_is_priced_before_its_first_call(monkeypatch):
    "By the table for the model that is in it, by what the user says for the other, not at all for a server of one's own."
    for name in ("TINKER_BASE_URL", "TINKER_PRICES"): monkeypatch.delenv(name, raising=False)
    eight, other = (plan_run("loop", profile) for profile in ("qwen3-8b-tinker", "qwen3-32b-tinker"))
    assert eight.dollars > 0.5 and not eight.memory and "?" in next(line for line in str(other).splitlines() if line.startswith("all"))
    monkeypatch.setenv("TINKER_PRICES", "0.195/0.60/0.44")
    assert plan_run("loop", "qwen3-32b-tinker").dollars == pytest.approx(eight.dollars)
    monkeypatch.setenv("TINKER_BASE_URL", "http://localhost:8765")
    assert plan_run("loop", "qwen3-8b-tinker").dollars == 0


def test_without_the_client_the_sentence_names_the_package(monkeypatch):
    "An experiment is refused before it starts."
    from poetry_iter.pipeline.parameters import check_engine

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tinker is not installed"): check_engine("tinker", {})


class Refusing(BaseHTTPRequestHandler):
    "A server that knows no key."

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"detail": "invalid api key"}')

    do_GET = do_POST
    def log_message(self, *args): pass


@client
def test_a_wrong_key_and_a_server_that_is_down_end_in_a_sentence(monkeypatch):
    "Within 30 seconds, though the client would go on."
    from poetry_iter.engines.tinker import Service

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    importlib.import_module("tinker")  # seconds, on a busy machine more
    for sentence in ("refuses the key in TINKER_API_KEY", "does not answer"):
        begun = time.monotonic()
        with pytest.raises(UserError, match=sentence): Service(f"http://127.0.0.1:{server.server_port}", "tml-wrong-key")
        assert time.monotonic() - begun < 30
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    "The open server on the embedded model; a session is forgotten 60 seconds after its last sign of life."
    if given := os.environ.get("TINKER_TEST_SERVER"):  # one that runs already
        yield given
        return
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(SERVER_PYTHON), "cloud/tinker_server.py", "--port", str(port), "--session-timeout-sec", "60", "--session-cleanup-interval-sec", "5"]
    log = open(ROOT / "outputs" / "tinker-server.log", "w")
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": ""})
    for _ in range(300):
        if process.poll() is not None: pytest.fail(f"the server ended: see {log.name}")
        try: urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=2); break
        except OSError: time.sleep(1)
    yield url
    process.terminate()
    process.wait(60)
    log.close()


@pytest.fixture
def there(server, monkeypatch, tmp_path):
    "The service as the environment names it, with a workplace of its own for what is kept."
    monkeypatch.setenv("TINKER_BASE_URL", server)
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    for name in ("data", "nbs"): (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(n: int) -> list:
    "Training examples of the shipped poems."
    renderer, _ = open_renderer(ModelSpec())
    poems, _ = load_poems(ROOT / "data/tiny_poems.jsonl")
    return [renderer.example(f"about {p.title}", p.title, p.content) for p in poems if len(p.content) < 400][:n]


def mean(losses) -> float: return float(np.concatenate(losses).mean(dtype=np.float64))


@pytest.mark.parametrize("part", [pytest.param("all", marks=slow)])
def test_training_there(there, part, monkeypatch):
    "Scores as here; the loss falls; a call that goes on does as one that never stopped; a checkpoint opened again is the same; a session that has ended is begun anew."
    from poetry_iter.engines.tinker import Service

    rows = examples(8)
    lm, here = open_engine(ModelSpec(engine="tinker")), open_engine(ModelSpec())
    ours, theirs = here.token_losses(rows), lm.token_losses(rows)
    print(f"scores: here {mean(ours):.4f}, there {mean(theirs):.4f}, largest difference of a poem {max(abs(float(a.mean() - b.mean())) for a, b in zip(ours, theirs)):.4f}")
    assert abs(mean(ours) - mean(theirs)) < 0.02 and max(abs(float(a.mean() - b.mean())) for a, b in zip(ours, theirs)) < 0.02

    how = Training(learning_rate=2e-3, learning_rate_end=1e-3, batch_size=2, micro_batch_size=2, lora_rank=8, in_order=True, saves=1)
    whole = train(lm, rows * 2, there / "whole", how, total_steps=8)
    other = open_engine(ModelSpec(engine="tinker"))
    half = train(other, rows, there / "half", how, total_steps=8)
    rest = train(other, rows, there / "rest", how, total_steps=8, previous=str(there / "half"))
    print("losses of one call:", np.round(whole["losses"], 3), "of two:", np.round(half["losses"] + rest["losses"], 3))
    assert np.mean(whole["losses"][4:]) < np.mean(whole["losses"][:4]) - 0.1 and np.allclose(whole["losses"], half["losses"] + rest["losses"], atol=0.02)
    assert rest["checkpoint"]["step"] == 8 and rest["learning_rates"] == pytest.approx(whole["learning_rates"][4:])

    waited, wait = [], Service.wait
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Service, "wait", lambda self, future, pause=0.5: wait(self, future, pause) if waited.append(1) or len(waited) < 14 else (_ for _ in ()).throw(KeyboardInterrupt))
        train(open_engine(ModelSpec(engine="tinker")), rows * 2, there / "killed", replace(how, saves=4), total_steps=8)
    saved = read_jsonl(there / "killed.work" / "saves.jsonl")
    again = train(open_engine(ModelSpec(engine="tinker")), rows * 2, there / "killed", replace(how, saves=4), total_steps=8)
    print(f"killed after a save at step {saved[-1]['step']}, gone on:", np.round(again["losses"], 3))
    assert 0 < saved[-1]["step"] < 8 and np.allclose(whole["losses"], again["losses"], atol=0.02)

    after = mean(other.token_losses(rows))
    assert after < mean(theirs) - 0.1 and mean(open_engine(spec_of(rest["checkpoint"], there)).token_losses(rows)) == pytest.approx(after, abs=0.005)
    if "TINKER_TEST_SERVER" not in os.environ:
        forgotten = open_engine(spec_of(rest["checkpoint"], there))
        forgotten.token_losses(rows[:1])
        for one in (other, forgotten): one.service.client.holder._session_heartbeat_task.cancel()
        time.sleep(90)
        fresh = examples(10)[8:]
        print(f"after the session has ended: {mean(forgotten.token_losses(fresh)):.4f}")


@pytest.mark.parametrize("part", [pytest.param("all", marks=slow)])
def test_a_client_that_does_not_speak_alike_ends_in_a_sentence(there, server, part):
    "The server's own environment holds the newest client, which posts what the server does not read."
    code = (f"from poetry_iter.engines.tinker import Service, client_version\ns = Service({server!r}, 'tml-none')\nt = s.call(s.client.create_lora_training_client, base_model='data/model', rank=8)\n"
            "import time\nbegun = time.monotonic()\nd = s.types.Datum(model_input=s.types.ModelInput.from_ints([5, 6]), loss_fn_inputs={'target_tokens': [6, 7], 'weights': [1.0, 1.0]})\n"
            "try: s.wait(t.forward_backward([d], 'cross_entropy'))\nexcept Exception as e: print(client_version(), round(time.monotonic() - begun), type(e).__name__, e)\nimport os; os._exit(0)")
    said = subprocess.run([str(SERVER_PYTHON), "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    print(said.stdout, said.stderr[-500:])
    version, seconds, kind, *_ = said.stdout.split()
    assert version != "0.22.7" and int(seconds) < 30 and kind == "UserError" and "do not speak alike" in said.stdout


@pytest.mark.parametrize("part", [pytest.param("all", marks=slow)])
def test_a_round_of_the_loop_there(there, part):
    "Describe, score, select, train on the server, and the checkpoint is an address."
    from poetry_iter.pipeline.runner import run_experiment

    settings = ["engine=tinker", "limit=10", "max_iterations=1", "num_candidates=2", "top_k=1", "description_tokens=96", "poem_tokens=96", "written_poems=2", "train_batch_size=4", "micro_batch_size=4",
                "learning_rate=2e-3", "learning_rate_end=1e-3", "held_out=0.3"]
    run_experiment("loop", settings=settings, run="there")
    [row] = read_jsonl(there / "outputs/there/checkpoints.jsonl")
    assert row["uri"].startswith("tinker://") and row["where"] == "round_001/checkpoint" and (there / "outputs/there/report.html").exists()


if __name__ == "__main__": sys.exit(pytest.main([__file__, "-s"]))
