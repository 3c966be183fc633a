"""Chat and server on the model that ships: real clients, and what goes wrong in use. One server for all of it."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from conftest import HOUSE

from poetry_iter.core import UserError
from poetry_iter.engine import ModelSpec
from poetry_iter.pipeline.command_line import main
from poetry_iter.use.door import Serving, take_port
from poetry_iter.use.server import make_server
from poetry_iter.use.service import WebService
from poetry_iter.use.turns import Turns

PLACES = 8
RAIN = [{"role": "user", "content": "Write a poem about rain."}]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def start(turns: Turns, **settings) -> SimpleNamespace:
    """A server in a thread, on a port that is free."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    sock = take_port("127.0.0.1", 0)
    serving = Serving(port=sock.getsockname()[1], places=turns.places, tokens=64, patience=5, **settings)
    service = WebService(serving, turns, (ModelSpec(), ModelSpec(), "the model that ships"))
    server = make_server(service)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return SimpleNamespace(service=service, server=server, thread=thread, turns=turns, port=serving.port, at=f"http://127.0.0.1:{serving.port}")


@pytest.fixture(scope="session")
def served():
    """The server that all tests ask; its model is open."""
    found = start(Turns(PLACES))
    place = found.turns.enter()
    found.turns.run(place, lambda: found.turns.model(ModelSpec()))
    place.leave()
    yield found
    found.server.should_exit = True
    found.thread.join(20)
    found.turns.close()


def ask(at: str, path: str, body=None, **headers) -> tuple[int, str, dict]:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(at + path, data, headers), timeout=120) as r:
            return r.status, r.read().decode(), dict(r.headers)
    except HTTPError as e:
        return e.code, e.read().decode(), dict(e.headers)


def talk(at: str, n: int = 4, **more) -> list[dict]:
    """The records of a streamed answer of n tokens."""
    status, said, _ = ask(at, "/api/chat", {"model": "embedded", "messages": RAIN, "options": {"seed": 3, "num_predict": n}, **more})
    assert status == 200 and said.endswith("\n")
    return [json.loads(line) for line in said.splitlines()]


def until(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def connect(served, n: int = 64) -> socket.socket:
    """A connection of our own that has asked for an answer of n tokens."""
    body = json.dumps({"model": "embedded", "messages": RAIN, "options": {"num_predict": n, "seed": 1, "temperature": 2.0}}).encode()
    s = socket.create_connection(("127.0.0.1", served.port))
    s.sendall(b"POST /api/chat HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return s


# ------------------------------------------------------------------ real clients


def test_the_ollama_client(served):
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(served.at)
    parts = list(client.chat("embedded", RAIN, stream=True, options={"seed": 3, "num_predict": 6}))
    whole = client.chat("embedded:latest", RAIN, options={"seed": 3, "num_predict": 6})
    assert "".join(p.message.content for p in parts) == whole.message.content != ""
    assert [p.done for p in parts] == [False] * (len(parts) - 1) + [True]
    last = parts[-1]
    assert last.done_reason == whole.done_reason == "length" and last.eval_count == 6 and last.prompt_eval_count > 10
    assert last.total_duration >= last.eval_duration > 0
    said = client.generate("embedded", "Write a poem.", system="You are a poet.", options={"num_predict": 3, "seed": 1})
    assert said.response and said.eval_count == 3
    assert client.generate("embedded", "Title:", raw=True, stream=False, options={"num_predict": 2}).prompt_eval_count < 6
    assert client.chat("embedded", []).done_reason == "load"
    assert [m.model for m in client.list().models][-1] == "embedded" and client.list().models[-1].size > 10**6
    assert client.show("embedded").capabilities == ["completion"]
    assert [m.model for m in client.ps().models] == ["embedded"]
    stopped = client.chat("embedded", RAIN, options={"seed": 3, "num_predict": 20, "stop": [":"]})
    assert stopped.done_reason == "stop" and stopped.message.content == whole.message.content.partition(":")[0]
    for wrong, status in (({"model": "nobody", "messages": RAIN}, 404), ({"model": "embedded", "messages": [{"role": "wizard", "content": "x"}]}, 400)):
        with pytest.raises(ollama.ResponseError) as e:
            client.chat(**wrong)
        assert e.value.status_code == status


def test_the_openai_client(served):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.at}/v1", api_key="none", max_retries=0)
    how = {"model": "embedded", "messages": RAIN, "seed": 3, "max_tokens": 6, "temperature": 0.8}
    whole = client.chat.completions.create(**how)
    parts = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for p in parts for c in p.choices) == whole.choices[0].message.content != ""
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 6
    assert parts[-1].usage == whole.usage and parts[-1].choices == []
    assert "embedded" in [m.id for m in client.models.list()]
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.chat.completions.create(**{**how, "model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="one choice"):
        client.chat.completions.create(**how, n=2)


def test_a_seed_gives_the_same_answer_streamed_or_not(served):
    streamed = "".join(r["message"]["content"] for r in talk(served.at, 8))
    assert streamed == talk(served.at, 8, stream=False)[0]["message"]["content"]


# ------------------------------------------------------------------ what comes over the wire


@pytest.mark.parametrize(
    "path, body, status, why",
    [
        ("/api/chat", b"{", 400, "not JSON"),
        ("/api/chat", b"\xff\xfe", 400, "not JSON"),
        ("/api/chat", b'{"model": "embedded", "options": {"temperature": NaN}}', 400, "not JSON"),
        ("/api/chat", b"[" * 50_000, 400, "not JSON"),
        ("/api/chat", [1], 400, "expected a JSON object"),
        ("/api/chat", {"messages": RAIN}, 400, "none named"),
        ("/api/chat", {"model": "data/model", "messages": RAIN}, 404, "not found"),
        ("/api/chat", {"model": "embedded", "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
        ("/api/chat", {"model": "embedded", "messages": [{"role": "user", "content": "rain " * 5000}]}, 400, "begin a new one"),
        ("/api/chat", {"model": "embedded", "messages": RAIN, "options": {"num_predict": "all"}}, 400, "num_predict"),
        ("/api/chat", {"model": "embedded", "messages": RAIN, "format": "json"}, 400, "format"),
        ("/api/generate", {"model": "embedded", "prompt": 7}, 400, "prompt: expected a text"),
        ("/api/verse", {"text": "x" * 2**20}, 413, "more than"),
        ("/api/verse", {"text": "snow", "form": "dance"}, 400, "no form is called"),
        ("/api/workshop", {"request": " "}, 400, "say what the poem"),
        ("/api/workshop", {"request": "snow", "poet": "/etc"}, 404, "not found"),
        ("/api/nothing", {}, 404, "nothing here"),
        ("/api/chat", None, 405, "another method"),
    ],
)
def test_a_bad_request(served, path, body, status, why):
    found, said, _ = ask(served.at, path, body)
    assert found == status and why in json.loads(said)["error"] and served.turns.inside == 0


def test_who_is_let_in(served):
    assert ask(served.at, "/api/tags", Host="evil.example")[0] == 403
    assert ask(served.at, "/api/verse", {"text": "snow"}, Origin="https://evil.example")[0] == 403
    assert ask(served.at, "/health", Host="[::1]:80")[0] == 200
    with pytest.raises(UserError, match="POETRY_ITER_KEY"):
        Serving(host="0.0.0.0", key="short")
    locked = start(served.turns, key="a key of some length")
    try:
        assert [ask(locked.at, p)[0] for p in ("/", "/page.js", "/health", "/api/tags", "/metrics")] == [200, 200, 200, 401, 401]
        assert ask(locked.at, "/api/tags", Authorization="Bearer a key of some lengtH")[0] == 401
        assert ask(locked.at, "/api/tags", Authorization="Bearer a key of some length")[0] == 200
    finally:
        locked.server.should_exit = True
        locked.thread.join(20)


# ------------------------------------------------------------------ many at once, and those who leave


def test_thirty_two_at_once(served):
    """As many as there are places are served, the others told when to come back; nothing is left behind."""
    hold, refused = threading.Event(), served.turns.counts["refused"]
    served.turns.thread.submit(hold.wait)
    with ThreadPoolExecutor(32) as crowd:
        asked = [crowd.submit(ask, served.at, "/api/chat", {"model": "embedded", "messages": RAIN, "options": {"num_predict": 2}}) for _ in range(32)]
        until(lambda: served.turns.counts["refused"] - refused == 32 - PLACES)
        assert json.loads(ask(served.at, "/health")[1])["requests"] == PLACES  # it answers meanwhile
        hold.set()
        found = [a.result() for a in asked]
    assert sorted(status for status, *_ in found) == [200] * PLACES + [503] * (32 - PLACES)
    for status, said, headers in found:
        if status == 503:
            assert 1 <= int(headers["retry-after"]) <= 60 and "try again in" in json.loads(said)["error"]
        else:
            assert json.loads(said.splitlines()[-1])["eval_count"] == 2
    assert served.turns.inside == 0


def test_company_changes_no_answer(served):
    """Six ask together and one of them goes away: each of the others hears what it hears alone."""
    said = lambda seed: talk(served.at, options={"seed": seed, "num_predict": 12})
    words = lambda rows: ("".join(r["message"]["content"] for r in rows), rows[-1]["eval_count"])
    alone = [words(said(seed)) for seed in range(5)]
    hold = threading.Event()
    served.turns.thread.submit(hold.wait)
    with ThreadPoolExecutor(5) as crowd:
        leaving = connect(served)
        asked = [crowd.submit(said, seed) for seed in range(5)]
        until(lambda: served.turns.inside == 6)
        hold.set()
        leaving.recv(400)
        leaving.close()
        assert [words(a.result()) for a in asked] == alone
    until(lambda: served.turns.inside == 0)


def test_a_client_that_goes_away(served):
    """In the middle of its answer, and while it waits for its turn: its place is free, and the work ends."""
    before = served.turns.counts["given up"]
    leaving = connect(served)
    assert leaving.recv(400).startswith(b"HTTP/1.1 200")
    leaving.close()
    until(lambda: served.turns.inside == 0 and served.turns.counts["given up"] == before + 1)
    hold = threading.Event()
    served.turns.thread.submit(hold.wait)
    waiting = connect(served)
    until(lambda: served.turns.inside == 1)
    waiting.close()
    until(lambda: served.turns.inside == 0)  # though its turn has not come
    hold.set()
    assert talk(served.at)[-1]["done"]


def test_a_slow_reader(served):
    """It holds up nobody, its place is free when its answer is done, and it gets every byte."""
    slow = connect(served, 24)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    got = slow.recv(16)
    assert talk(served.at)[-1]["done"]
    until(lambda: served.turns.inside == 0)
    while piece := slow.recv(64):
        got += piece
    assert b'"done": true' in got and got.endswith(b"0\r\n\r\n")


def test_a_body_that_does_not_come(served):
    s = socket.create_connection(("127.0.0.1", served.port))
    s.sendall(b"POST /api/chat HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    s.settimeout(30)
    assert s.recv(100).startswith(b"HTTP/1.1 408")
    assert served.turns.inside == 0


def test_a_model_that_crashes(served):
    """In the middle of a stream the last record says so; before the first the status does; the next who asks is served."""
    openai = pytest.importorskip("openai")

    def crash(after):
        lm, calls = served.turns.model(ModelSpec()), []
        assert lm.forward  # its own check asks the head too

        def fault(*_):
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("no memory left")

        lm.model.lm_head.register_forward_hook(fault)

    failed = served.turns.counts["failed"]
    served.turns.thread.submit(crash, 3).result()
    rows = talk(served.at, 20)
    assert len(rows) == 4 and "no memory left" in rows[-1]["error"] and not any(r.get("done") for r in rows)
    served.turns.thread.submit(crash, 3).result()
    client = openai.OpenAI(base_url=f"{served.at}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="no memory left"):
        list(client.chat.completions.create(model="embedded", messages=RAIN, max_tokens=20, stream=True))
    served.turns.thread.submit(crash, 0).result()
    assert ask(served.at, "/api/chat", {"model": "embedded", "messages": RAIN})[0] == 500
    assert talk(served.at)[-1]["done"] and served.turns.counts["failed"] == failed + 3 and served.turns.inside == 0
    text = ask(served.at, "/metrics")[1]
    assert f"poetry_iter_failed_total {failed + 3}\n" in text and 'poetry_iter_requests_total{path="/api/chat",status="200"}' in text


# ------------------------------------------------------------------ the workshop and its page


def test_a_session_comes_as_events(served):
    status, said, headers = ask(served.at, "/api/workshop", {"request": "winter light", "form": "haiku", "revisions": 1, "tokens": 16})
    events = [json.loads(line) for line in said.splitlines()]
    assert status == 200 and headers["content-type"].startswith("application/x-ndjson")
    assert events[0]["event"] == "crew" and events[0]["demonstration"]
    steps = [e for e in events if e["event"] == "step"]
    assert steps[0]["step"] == "brief" and {"draft", "critique"} <= {e["step"] for e in steps}
    session = events[-1]["session"]
    drafts = [e for e in steps if e["step"] == "draft" and e["text"]]
    assert drafts[0]["text"] == session["revision_history"][0]["draft"] and {"label", "p_good", "unsure", "reasons"} <= drafts[0]["judgement"].keys()
    pieces = "".join(e["text"] for e in events[: events.index(steps[0])] if e["event"] == "piece")
    assert pieces.strip() == steps[0]["text"]
    assert served.turns.inside == 0


def test_verse(served):
    text = "The light comes late across the kitchen floor\nand finds the kettle where it always stood,\nit reads the meter at the cellar door\nand finds the number, as it said it would."
    _, said, _ = ask(served.at, "/api/verse", {"text": text, "form": "quatrain"})
    found = json.loads(said)
    assert [line["rhyme"] for line in found["lines"]] == list("ABAB") and found["asked"]["accepted"] and found["meter"]["name"] == "iambic pentameter"
    assert all(len(line["marks"]) == len(line["text"]) for line in found["lines"])


class Browser:
    """Headless Chromium, over its debugging protocol."""

    def __init__(self, folder: Path, width: int, height: int):
        websocket = pytest.importorskip("websocket", reason="websocket-client is not installed")
        size = f"--window-size={width},{height}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-allow-origins=*"]
        self.process = subprocess.Popen([CHROMIUM, *flags, "--remote-debugging-port=0", f"--user-data-dir={folder}", size, "about:blank"], **quiet)
        until(lambda: (folder / "DevToolsActivePort").exists() and len((folder / "DevToolsActivePort").read_text().split()) > 1, 90)
        port = (folder / "DevToolsActivePort").read_text().split()[0]
        page = next(p for p in json.load(urlopen(f"http://127.0.0.1:{port}/json")) if p["type"] == "page")
        self.socket, self.number = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=120), 0

    def __call__(self, method: str, **params) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (found := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        return found["result"]

    def js(self, expression: str):
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_the_page(served, tmp_path):
    """A request is typed and a poem read, on a wide and on a narrow screen; a picture is kept where PICTURES names a folder."""
    browser = Browser(tmp_path / "profile", 1280, 800)
    try:
        browser("Page.navigate", url=served.at)
        until(lambda: browser.js("document.querySelectorAll('#form option').length > 5"))
        assert browser.js("document.activeElement.id") == "request" and not browser.js("document.getElementById('demonstration').hidden")
        browser("Input.insertText", text="a poem about winter light")
        browser.js("document.getElementById('revisions').value = '0'")
        for kind in ("keyDown", "keyUp"):  # Ctrl-Enter
            browser("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", modifiers=2, windowsVirtualKeyCode=13)
        until(lambda: browser.js("/^(Done|It ended)/.test(document.getElementById('status').textContent)"), 120)
        assert browser.js("document.querySelectorAll('#drafts .draft').length") == 1
        until(lambda: browser.js("document.querySelectorAll('.facts, .odd').length > 0"))
        assert len(browser.js("document.querySelector('.draft').innerText")) > 20
        for width in (1280, 360):
            browser("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
            assert browser.js("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
            png = base64.b64decode(browser("Page.captureScreenshot", format="png")["data"])
            assert png.startswith(b"\x89PNG") and len(png) > 5000
            if folder := os.environ.get("PICTURES"):
                (Path(folder) / f"page_{width}.png").write_bytes(png)
    finally:
        browser.close()


# ------------------------------------------------------------------ the commands


def test_ending_the_server(capsys):
    """The command itself, ended by SIGTERM in the middle of an answer: the answer ends whole, then the server does; another one may not have its port."""
    with take_port("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    at, found = f"http://127.0.0.1:{port}", SimpleNamespace(got=b"")

    def client():
        try:
            until(lambda: up(port))
            found.taken = ask(at, "/health")[0], port_taken(port)
            going = connect(SimpleNamespace(port=port))
            found.got = going.recv(300)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        while piece := going.recv(4096):
            found.got += piece

    thread = threading.Thread(target=client)
    thread.start()
    assert main(["serve", "embedded", "--port", str(port), "--tokens", "64"]) == 0
    thread.join()
    assert found.taken == (200, True) and b'"done": true' in found.got
    said = capsys.readouterr().err
    assert at in said and said.endswith("poetry-iter: ended\n")


def up(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def port_taken(port: int) -> bool:
    """Whether a second server is refused the port, in a sentence."""
    with pytest.raises(UserError, match="is in use by another program"):
        take_port("127.0.0.1", port)
    return True


def chat(monkeypatch, capsys, lines: str, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status = main(["chat", *args])
    return status, *capsys.readouterr()


def test_chat_in_a_pipe(monkeypatch, capsys, tmp_path):
    kept = tmp_path / "talk.json"
    status, out, err = chat(monkeypatch, capsys, f'Write a poem.\n/debug\n/nonsense\n/save {kept}\n/clear\n/load {kept}\n"""two\nlines"""\n/exit\nnever\n', "embedded", "--tokens", "6", "--seed", "1")
    assert status == 0 and len(out.splitlines()) >= 2
    assert "small demonstration model" in err and "<|im_start|>user\nWrite a poem.<|im_end|>" in err and "no such command" in err and "2 messages" in err
    assert "tokens of context" in err and "never" not in err
    assert [m["role"] for m in json.loads(kept.read_text())["messages"]] == ["user", "assistant"]


def test_models_that_cannot_be_talked_to(monkeypatch, capsys, tmp_path):
    """Told in a sentence: a missing or broken GGUF, a run without a checkpoint, a tokenizer without a template."""
    broken, folder, run = tmp_path / "broken.gguf", tmp_path / "mute", tmp_path / "wry-yeats-0001"
    broken.write_bytes(b"GGML\x00\x00")
    shutil.copytree(HOUSE / "data/model", folder)
    (folder / "chat_template.jinja").unlink()
    run.mkdir()
    (run / "config.json").write_text('{"experiment": "loop", "parameters": {}}')
    for name, why in {"nowhere.gguf": "no such file", str(broken): "not a GGUF file", str(run): "no checkpoint", str(folder): "no chat template; use the `base` renderer", "nobody": "no such model"}.items():
        status, out, err = chat(monkeypatch, capsys, "hello\n", name)
        assert (status, out) == (2, "") and why in err and "Traceback" not in err
    status, out, err = chat(monkeypatch, capsys, "snow\n", str(folder), "--renderer", "base", "--tokens", "4")
    assert status == 0 and out.strip()
    assert main(["serve", "--host", "0.0.0.0"]) == 2 and "POETRY_ITER_KEY" in capsys.readouterr().err
