"""What goes elsewhere: the wheel, cards, the hub (a stand-in on loopback that speaks its protocol), trackers."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from poetry_iter.core import UserError, write_json, write_jsonl
from poetry_iter.pipeline.command_line import main
from poetry_iter.pipeline.publishing import adapter_card, push_run, write_cards
from poetry_iter.pipeline.runner import run_experiment
from poetry_iter.runs import open_run

HOUSE = Path(__file__).resolve().parents[1]


class Hub(BaseHTTPRequestHandler):
    """Repositories, large files and commits, as far as a push needs them."""

    def answer(self, body: dict, status: int = 200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        raw, hub = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.server
        if self.headers.get("authorization") != "Bearer hf_sesame_sesame":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            said = json.loads(raw)
            hub.repos.append((f"{said.get('organization') or 'somebody'}/{said['name']}", bool(said.get("private")) or said.get("visibility") == "private"))
            self.answer({"url": f"{hub.url}/{hub.repos[-1][0]}", "id": hub.repos[-1][0]})
        elif "/preupload/" in self.path:
            files = json.loads(raw)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}} for o in json.loads(raw)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.large[line["value"]["oid"]]
            self.answer({"commitUrl": f"{hub.url}/somebody/poet/commit/4f2a", "commitOid": "4f2a" * 10, "success": True})
        else:
            self.answer({})

    def do_PUT(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path.endswith(hashlib.sha256(raw).hexdigest())
        self.server.large[self.path.rpartition("/")[2]] = raw
        self.answer({})

    def log_message(self, *_): ...


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.repos, server.large, server.files = f"http://127.0.0.1:{server.server_port}", [], {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # large files the older way, which the real hub takes too
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def trained(tmp_path):
    """A run of one round with a small adapter."""
    run = open_run(tmp_path / "quiet-keats-0001")
    write_json(run.path / "config.json", {"experiment": "loop", "parameters": {"arm": "topk", "score": "contrast"}})
    write_jsonl(run.path / "poems.jsonl", [{"title": f"Poem {i}", "content": "a line", "split": "held_out" if i < 3 else "train", "license": "CC0-1.0"} for i in range(9)])
    for n in (0, 1):
        run.log(n, "evaluate", {"gain_over_other": 0.25 + n, "gain_over_other_lo": 0.125 + n, "gain_over_other_hi": 0.5 + n, "poems": 3})
        write_jsonl(run.round(n) / "held_out.jsonl", [{"poem_id": str(i), "gain_over_other": n + i / 16} for i in range(3)])
    folder = run.round(1) / "checkpoint"
    write_json(folder / "adapter_config.json", {"r": 1, "base_model_name_or_path": str(HOUSE / "data/model"), "peft_type": "LORA"})
    write_json(folder / "made_with.json", {"base": "data/model", "renderer": "chat"})
    save_file({"base_model.model.x.lora_A.weight": np.ones((1, 4), np.float32), "base_model.model.x.lora_B.weight": np.ones((4, 1), np.float32)}, folder / "adapter_model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"not for elsewhere")
    run.add_checkpoint({"base": "data/model", "base_hash": "9f" * 8, "renderer": "chat", "engine": "transformers", "load_in_4bit": False, "where": "round_001/checkpoint", "step": 3, "rows_hash": "", "name": "round_001", "round": 1, "parent": "base"})
    return run


def test_a_push_takes_card_and_weights_and_nothing_of_the_optimizer(hub, trained, monkeypatch):
    with pytest.raises(UserError, match="no HF_TOKEN"):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        push_run(str(trained.path), "somebody/poet")
    monkeypatch.setenv("HF_TOKEN", "hf_sesame_sesame")
    assert push_run(str(trained.path), "somebody/poet", base="somebody/base", private=True) == f"{hub.url}/somebody/poet/commit/4f2a"
    assert hub.repos == [("somebody/poet", True)]
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "made_with.json"]
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "somebody/base"
    assert hub.files["adapter_model.safetensors"] == (trained.path / "round_001/checkpoint/adapter_model.safetensors").read_bytes()
    card = hub.files["README.md"].decode()
    assert "base_model: somebody/base" in card and "6 to train on, 3 held out; CC0-1.0: 9" in card and "more than none" in card
    monkeypatch.setenv("HF_TOKEN", "hf_another_one")
    with pytest.raises(UserError, match=r"the hub refuses \(401"):
        push_run(str(trained.path), "somebody/poet")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        push_run(str(trained.path), "somebody/poet")


def test_a_card_says_what_was_measured(trained):
    (card,) = write_cards(trained)
    text = card.read_text()
    assert text == adapter_card(trained, trained.checkpoints()[0])
    assert "| gain over another's | 0.250 [0.125,\u00a00.500] | 1.250 [1.125,\u00a01.500] |" in text and str(HOUSE) not in text


def test_numbers_reach_tensorboard(tiny, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tiny.path)
    run_experiment("tiny", settings=["step=3", "report_to=tensorboard"], run="a", progress=False)
    events = EventAccumulator(str(tiny.run("a") / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    seen = {tag: [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    assert seen["add/sum"] == [(1, 3.0), (2, 6.0)] and "report_to" not in json.loads((tiny.run("a") / "config.json").read_text())["parameters"]


def test_a_tracker_that_is_not_installed_or_not_known(tiny, capsys):
    done = tiny.cli("run", "tiny", "-p", "report_to=nowhere")
    assert done.returncode == 2 and "report_to: expected one of" in done.stderr and not (tiny.path / "outputs").exists()


def test_a_hub_that_is_not_there_is_told_in_seconds_and_leaves_no_run(house, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = house.cli("run", "loop", "-p", "model=Qwen/Qwen3-0.6B")
    assert done.returncode == 2 and "hf download Qwen/Qwen3-0.6B" in done.stderr and not (house.path / "outputs").exists()


def test_words_that_are_none_get_a_guess(capsys):
    for words, guess in ((["rnu"], "did you mean run?"), (["run", "loop", "--prfile", "x"], "did you mean --profile?"), (["poems", "chek"], "did you mean check?")):
        with pytest.raises(SystemExit) as e:
            main(words)
        assert e.value.code == 2 and guess in capsys.readouterr().err


def test_the_tab_key(tmp_path):
    pytest.importorskip("argcomplete")
    out = tmp_path / "said"
    env = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "COMP_LINE": "poetry-iter run loop -p arm=ra", "COMP_POINT": "30", "PATH": "/usr/bin", "PYTHONPATH": str(HOUSE), "_ARGCOMPLETE_IFS": "\n"}
    subprocess.run([sys.executable, "-c", "from poetry_iter.pipeline.command_line import main; main()"], env=env, cwd=HOUSE, check=True)
    assert "random" in out.read_text()


@pytest.mark.slow
def test_the_wheel_carries_what_a_run_reads(tmp_path):
    """Built without the network, as `pip wheel` does; what it holds is named, and house() finds it."""
    subprocess.run([sys.executable, "-c", "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])", str(tmp_path)], cwd=HOUSE, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    share = "poetry_iter/share"
    for needed in ("nbs/loop/experiment.yaml", "nbs/loop/6_report.ipynb", "nbs/loop/profiles/default.yaml", "nbs/workshop/8_session.ipynb", "data/model/model.safetensors", "data/tiny_poems.jsonl", "outputs/reference/runs.jsonl"):
        assert f"{share}/{needed}" in names
    assert not any(n.startswith(f"{share}/nbs/lib") for n in names)
