"""A server on 127.0.0.1 that speaks vLLM's completions protocol and answers by the embedded model, with faults that can be asked for.

`python tests/completions_server.py [PORT]` serves until it is stopped; the tests use `serve()`.
"""

import json
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from poetry_iter.core import UserError
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.renderers import Example

FAULTS = {"429": (429, {"retry-after": "0.2"}), "500": (500, {}), "503": (503, {"retry-after": "0.2"}), "400": (400, {}), "401": (401, {})}


class Completions(ThreadingHTTPServer):
    """One model, its adapters, and what was asked of them."""

    daemon_threads = True

    def __init__(self, port=0, name="embedded", engine=None, **without):
        super().__init__(("127.0.0.1", port), Handler)
        self.name, self.engines, self.lock = name, {name: engine or open_engine(ModelSpec())}, threading.Lock()
        self.seen, self.faults, self.delay = [], deque(), 0.0  # one fault for each coming completion
        self.at_once = self.most_at_once = 0
        self.can = {"ids": True, "n": True, "prompt_logprobs": True, "echo": True, "tokenize": True, "lora": True, "token_ids": True, **without}
        self.fewer = 0  # log-probabilities that are left out of an answer
        self.shift = 0  # by which those of a prompt are off

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def tokenizer(self):
        return self.engines[self.name].tokenizer

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def losses(self, lm, tokens):
        """Log-probabilities of all tokens but the first."""
        return [None, *(-lm.token_losses([Example(tokens, [0] + [1] * (len(tokens) - 1))])[0]).tolist()]

    def complete(self, body):
        lm = self.engines[body["model"]]
        prompt = body["prompt"] if isinstance(body["prompt"], list) else self.encode(body["prompt"])
        if len(prompt) + body["max_tokens"] > lm.context_length:
            raise UserError(f"This model's maximum context length is {lm.context_length} tokens")
        sampling = Sampling(body.get("temperature", 1.0), body.get("top_p", 1.0), body.get("top_k", 0), max(1, body["max_tokens"]))
        end = (body.get("stop_token_ids") or [self.tokenizer.eos_token_id])[0]
        n = body.get("n", 1) if self.can["n"] else 1
        said = lm.sample([prompt], end, n, sampling, [body.get("seed", 0)])[0]
        return {
            "object": "text_completion", "model": body["model"], "choices": [self.choice(lm, body, prompt, c, i) for i, c in enumerate(said)],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": sum(len(c.tokens) for c in said)},
        }  # fmt: skip

    def choice(self, lm, body, prompt, said, i):
        out = {"index": i, "text": said.text, "finish_reason": said.ended, "logprobs": None}
        if body.get("return_token_ids") and self.can["token_ids"]:
            out["token_ids"] = said.tokens
        if (body.get("prompt_logprobs") is not None and self.can["prompt_logprobs"]) or body.get("logprobs") is not None:
            tokens = prompt + said.tokens
            values = self.losses(lm, tokens)
            mine = [None, *([None] * self.shift + values[1:])[: len(prompt) - 1]]
            if body.get("prompt_logprobs") is not None and self.can["prompt_logprobs"]:
                rows = [v if v is None else {str(t): {"logprob": v, "rank": 1}} for t, v in zip(prompt, mine)]
                out["prompt_logprobs"] = rows[: len(rows) - self.fewer]
            if body.get("logprobs") is not None:
                echo = body.get("echo") and self.can["echo"]
                shown = (mine if echo else []) + values[len(prompt) :]
                out["logprobs"] = {
                    "token_logprobs": shown[self.fewer :],
                    "tokens": [lm.renderer.decode([t]) for t in (tokens if echo else said.tokens)],
                }
        return out

    def models(self):
        rows = [{"id": self.name, "root": self.name, "parent": None, "max_model_len": self.engines[self.name].context_length}]
        return rows + [{"id": n, "root": n, "parent": self.name} for n in self.engines if n != self.name]


class Handler(BaseHTTPRequestHandler):
    """The protocol."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, obj, headers=None, cut=False):
        data, kind = (obj.encode(), "text/plain") if isinstance(obj, str) else (json.dumps(obj).encode(), "application/json")
        self.send_response(status)
        for k, v in {"content-type": kind, "content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def error(self, status, message, headers=None):
        self.send(status, {"error": {"message": message, "type": "BadRequestError", "code": status}}, headers)

    def do_GET(self):
        self.send(200, {"object": "list", "data": self.server.models()})

    def do_POST(self):
        s = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        if self.path == "/tokenize" and s.can["tokenize"]:
            return self.send(200, {"tokens": s.encode(body["prompt"])})
        if self.path == "/v1/load_lora_adapter" and s.can["lora"]:
            return self.load(body)
        if self.path != "/v1/completions":
            return self.error(404, "Not Found")
        with s.lock:
            s.seen.append(body)
            fault = s.faults.popleft() if s.faults else None
            s.at_once += 1
            s.most_at_once = max(s.most_at_once, s.at_once)
        try:
            time.sleep(s.delay)
            self.complete(body, fault)
        finally:
            with s.lock:
                s.at_once -= 1

    def complete(self, body, fault):
        s = self.server
        if fault in FAULTS:
            return self.error(FAULTS[fault][0], "as the test asked", FAULTS[fault][1])
        if fault == "page":
            return self.send(200, "<html>a proxy</html>")
        if body["model"] not in s.engines:
            return self.error(404, f"The model `{body['model']}` does not exist.")
        if isinstance(body["prompt"], list) and not s.can["ids"]:
            return self.error(500, "Input should be a valid string")
        try:
            with s.lock:
                answer = s.complete(body)
        except UserError as e:
            return self.error(400, str(e))
        if body.get("stream"):
            return self.stream(answer["choices"][0])
        self.send(200, answer, cut=fault == "cut")

    def stream(self, choice):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        pieces = choice["text"].splitlines(keepends=True)
        for i, piece in enumerate(pieces):
            row = {"choices": [{"index": 0, "text": piece, "finish_reason": choice["finish_reason"] if i + 1 == len(pieces) else None}]}
            self.wfile.write(f"data: {json.dumps(row)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def load(self, body):
        s = self.server
        if "lora_name" not in body or not Path(body.get("lora_path", "")).is_dir():
            return self.error(400, "lora_name and lora_path of a folder are needed")
        with s.lock:
            s.engines[body["lora_name"]] = open_engine(ModelSpec(name=s.engines[s.name].spec.name).on(body["lora_path"]))
        self.send(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")


@contextmanager
def serve(**kwargs):
    """A server in a thread."""
    server = Completions(**kwargs)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serve(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0) as server:
        print(server.url, flush=True)
        threading.Event().wait()
