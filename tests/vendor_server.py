"""A server on 127.0.0.1 that speaks the vendor's Messages and Message Batches protocol (and chat completions), with faults that can be asked for.

`python tests/vendor_server.py` serves until it is stopped; the tests use `serve()`.
"""

import gzip
import hashlib
import json
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789-secret"
MODELS = {"claude-opus-5-5": (4, 20, 0.05), "claude-haiku-4-5": (1, 5, 0.1), "tiny": (0, 0, 0), "dear": (1, 2, 0.1)}  # dollars per million tokens in and out, share for a cache read
FAULTS = {  # status, type, headers
    "429": (429, "rate_limit_error", {"retry-after": "1"}),
    "529": (529, "overloaded_error", {}),
    "500": (500, "api_error", {}),
    "400": (400, "invalid_request_error", {}),
    "402": (402, "billing_error", {}),
    "wait a day": (429, "rate_limit_error", {"retry-after": "86400"}),
    "wait for ever": (429, "rate_limit_error", {"retry-after": "inf"}),
    "wait two seconds": (429, "rate_limit_error", {"retry-after": "date"}),  # as an HTTP date
    "echo the key": (401, "authentication_error", {}),
    "redirect": (307, "redirect", {"location": "http://127.0.0.1:9/v1/messages"}),
}
USAGES = {  # what may stand where the usage is expected
    "no usage": None,
    "usage not counted": {},
    "negative usage": {"input_tokens": -1_000_000, "output_tokens": -50},
    "usage in words": {"input_tokens": "many", "output_tokens": "some"},
    "usage NaN": {"input_tokens": float("nan"), "output_tokens": float("nan")},
    "usage without end": {"input_tokens": 10**15, "output_tokens": 10**15},
}
PACKED = gzip.compress(bytes(80_000_000))  # 78 kB on the way
ODD = ("odd ending", "half a character", *USAGES)  # answers that were paid, and that are odd


def instance(schema: dict):
    """The smallest thing that a JSON schema allows."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {k: instance(v) for k, v in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema["items"])]
    return {"string": "a gutter in October", "integer": 1, "number": 0.5, "boolean": True}[kind]


class Vendor(ThreadingHTTPServer):
    """What the vendor knows: requests seen, batches, and what it has charged."""

    daemon_threads = True

    def __init__(self, answer=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.row_faults = deque(), deque()  # one for each coming request; one for each coming row of a batch
        self.seen, self.batches, self.billed, self.lock = [], {}, 0.0, threading.Lock()
        self.answer = answer or (lambda body: f"An answer to {body['messages'][-1]['content'][:40]!r}.")
        self.batch_polls = 1  # polls before a batch has ended
        self.delay = 0.0  # seconds before an answer
        self.clock = timedelta(0)  # how far the vendor's clock is from ours
        self.odd_list = []  # what else stands in the list of batches
        self.ends_early = 0  # times that the results of a batch come without their last rows
        self.loses_rows = 0  # rows at the end of them
        self.idempotent = False  # does it answer a request that it knows by its name with what it has?
        self.models = "list"  # what GET /v1/models gives: list, missing, html or nothing
        self.names, self.delivered = {}, Counter()  # answers by idempotency key; charged answers that were sent whole, by request
        self.at_once = self.most_at_once = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def now(self):
        return datetime.now(UTC) + self.clock

    @property
    def paid_twice(self):
        """Requests that were charged again though their answer had been sent whole."""
        return sum(n - 1 for n in self.delivered.values())

    def count(self, kind):
        """Requests seen of a kind: messages, batch (submitted), poll, results, list, chat."""
        return sum(k == kind for k, _ in self.seen)

    def charge(self, model, usage, share=1.0):
        price_in, price_out, read = MODELS[model]
        tokens = usage["input_tokens"] + 1.25 * usage["cache_creation_input_tokens"] + read * usage["cache_read_input_tokens"]
        with self.lock:
            self.billed += share * (tokens * price_in + usage["output_tokens"] * price_out) / 1e6

    def message(self, body, fault=None, share=1.0):
        """The vendor's message for a call; charged."""
        form = body.get("output_config", {}).get("format") or body.get("response_format", {}).get("json_schema")
        text, stop = json.dumps(instance(form["schema"])) if form else self.answer(body), "end_turn"
        if fault == "truncated":
            text, stop = text[: len(text) // 2], "max_tokens"
        if fault == "malformed":
            text = text[: len(text) // 2] if form else "{"
        if fault == "refusal":
            text, stop = "", "refusal"
        if fault == "empty":
            text = "  "
        system = body.get("system", "")
        marked = isinstance(system, list) and "cache_control" in system[0]
        size = len(json.dumps(body["messages"])) // 4
        shared = len(system[0]["text"]) // 4 if marked else 0
        with self.lock:
            known = marked and any(k == "persona" and v == system[0]["text"] for k, v in self.seen)
            if marked and not known:
                self.seen.append(("persona", system[0]["text"]))
        usage = {
            "input_tokens": size + (0 if marked else len(system) // 4),
            "cache_creation_input_tokens": 0 if known else shared,
            "cache_read_input_tokens": shared if known else 0,
            "output_tokens": body["max_tokens"] if fault == "truncated" else min(body["max_tokens"], len(text) // 3 + 1),
        }
        self.charge(body["model"], usage, share)
        if fault not in ("cut_body", "html"):
            self.delivered[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
        if fault == "odd ending":
            stop = "out_of_ink"
        if fault == "half a character":
            text = text[:5] + "\ud83d" + text[5:]
        if fault in USAGES:
            usage = USAGES[fault]
        content = [{"type": "thinking", "thinking": "", "signature": "x"}, {"type": "text", "text": text}]
        return {"id": f"msg_{len(self.seen)}", "type": "message", "role": "assistant", "model": body["model"], "content": content,
                "stop_reason": stop, "stop_sequence": None, "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """The protocol."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def date_time_string(self, timestamp=None):
        return super().date_time_string(timestamp or self.server.now.timestamp())

    def send(self, status, obj, headers=None, cut=False):
        data = obj if isinstance(obj, bytes) else json.dumps(obj).encode()
        self.send_response(status)
        for k, v in {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def error(self, status, kind, message="as the test asked", headers=None):
        self.send(status, {"type": "error", "error": {"type": kind, "message": message}}, headers)

    def allowed(self):
        key = self.headers.get("x-api-key") or self.headers.get("authorization", "").removeprefix("Bearer ")
        if key in (KEY, "none"):
            return True
        self.error(401, "authentication_error", f"invalid x-api-key {key}")  # it says the key again, as some do
        return False

    def do_POST(self):
        v = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        if not self.allowed():
            return
        kind = {"/v1/messages": "messages", "/v1/messages/batches": "batch", "/v1/chat/completions": "chat"}.get(self.path, "cancel")
        with v.lock:
            v.seen.append((kind, body))
            fault = v.faults.popleft() if v.faults else None
            v.at_once += 1
            v.most_at_once = max(v.most_at_once, v.at_once)
        try:
            time.sleep(v.delay)
            self.post(kind, body, fault)
        finally:
            with v.lock:
                v.at_once -= 1

    def post(self, kind, body, fault):
        v = self.server
        if fault in FAULTS:
            status, name, headers = FAULTS[fault]
            if headers.get("retry-after") == "date":
                headers = {"retry-after": self.date_time_string((v.now + timedelta(seconds=2)).timestamp())}
            return self.error(status, name, f"invalid x-api-key {KEY}" if fault == "echo the key" else "as the test asked", headers)
        if fault == "nonsense":
            return self.send(200, {"type": "nonsense"})
        if fault == "page":  # of a proxy: the vendor has never heard of it
            return self.send(200, b"<html>a proxy</html>", {"content-type": "text/html"})
        if fault == "packed":
            return self.send(200, PACKED, {"content-encoding": "gzip"})
        if fault == "cut":  # nothing comes back, and nothing was charged
            self.close_connection = True
            return self.connection.close()
        if kind == "batch":
            return self.submit(body, fault)
        if body["model"] not in MODELS:
            return self.error(404, "not_found_error", f"model: {body['model']}")
        if body.get("temperature") and body["model"] == "claude-opus-5-5":
            return self.error(400, "invalid_request_error", "temperature is not supported")
        name = self.headers.get("idempotency-key")
        message = v.names.get(name) if v.idempotent else None
        if message is None:
            message = v.names[name] = v.message(body, fault)
        if kind == "chat":
            text, end = message["content"][1]["text"], {"max_tokens": "length", "refusal": "content_filter", "end_turn": "stop"}.get(message["stop_reason"], message["stop_reason"])
            message = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"],
                       "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}],
                       "usage": message["usage"] and {"prompt_tokens": message["usage"].get("input_tokens"), "completion_tokens": message["usage"].get("output_tokens")}}
        if fault == "html":
            return self.send(200, b"<html>a proxy</html>", {"content-type": "text/html"})
        self.send(200, message, cut=fault == "cut_body")  # a body that is cut was charged

    def submit(self, body, fault):
        v, rows = self.server, []
        if any(r["params"]["model"] not in MODELS for r in body["requests"]):
            return self.error(404, "not_found_error", "model")
        for r in body["requests"]:
            bad = v.row_faults.popleft() if v.row_faults else None
            if bad in ("expired", "canceled"):
                result = {"type": bad}
            elif bad in ("errored", "invalid"):
                kind = "api_error" if bad == "errored" else "invalid_request_error"
                result = {"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": "as the test asked"}}}
            else:
                result = {"type": "succeeded", "message": v.message(r["params"], bad, 0.5)}
            if bad == "odd type":
                result = {**result, "type": "half-done"}
            rows.append({"custom_id": "who-knows" if bad == "odd name" else r["custom_id"], "result": "nothing" if bad == "no result" else result})
        name, now = f"msgbatch_{len(v.batches):04d}", v.now
        with v.lock:
            v.batches[name] = {"rows": rows[::-1], "polls": 0, "made": now}
        if fault in ("cut_body", "lost"):  # taken and charged, but its id is never heard
            self.close_connection = True
            return self.connection.close()
        self.send(200, self.batch(name))

    def batch(self, name):
        v, b = self.server, self.server.batches[name]
        ended, tally = b["polls"] >= v.batch_polls, dict.fromkeys(("processing", "succeeded", "errored", "expired", "canceled"), 0)
        for r in b["rows"]:
            kind = r["result"]["type"] if isinstance(r["result"], dict) else "succeeded"
            tally[("succeeded" if kind not in tally else kind) if ended else "processing"] += 1
        return {"id": name, "type": "message_batch", "processing_status": "ended" if ended else "in_progress", "request_counts": tally,
                "created_at": b["made"].isoformat(), "expires_at": (b["made"] + timedelta(days=1)).isoformat(),
                "ended_at": b["made"].isoformat() if ended else None, "results_url": f"{v.url}/v1/messages/batches/{name}/results" if ended else None,
                "archived_at": None, "cancel_initiated_at": None}

    def do_GET(self):
        v = self.server
        if not self.allowed():
            return
        parts = self.path.partition("?")[0].strip("/").split("/")[3:]  # v1 messages batches …
        kind = "models" if self.path.startswith("/v1/models") else "list" if not parts else "results" if parts[-1] == "results" else "poll"
        with v.lock:
            v.seen.append((kind, self.path))
            fault = v.faults.popleft() if v.faults and kind != "models" and str(v.faults[0]).startswith("get:") else None
        if fault:
            status, name, headers = FAULTS[fault.removeprefix("get:")]
            return self.error(status, name, headers={k: self.date_time_string((v.now + timedelta(seconds=2)).timestamp()) if x == "date" else x for k, x in headers.items()})
        if kind == "models":
            if v.models == "list":
                return self.send(200, {"object": "list", "data": [{"id": m, "type": "model", "object": "model"} for m in MODELS], "has_more": False})
            if v.models == "nothing":
                time.sleep(1)
            return self.send(200, b"<html>") if v.models == "html" else self.error(404, "not_found_error")
        if kind == "list":
            return self.send(200, {"data": [*v.odd_list, *(self.batch(n) for n in reversed(v.batches))], "has_more": False, "first_id": None, "last_id": None})
        if parts[0] not in v.batches:
            return self.error(404, "not_found_error", f"batch {parts[0]}")
        if kind == "results":
            lines = "".join(json.dumps(r) + "\n" for r in v.batches[parts[0]]["rows"]).splitlines(keepends=True)
            if v.ends_early:
                v.ends_early -= 1
                lines = [*lines[: -v.loses_rows], lines[-v.loses_rows][:20]]
            return self.send(200, "".join(lines).encode(), {"content-type": "application/x-jsonl"})
        v.batches[parts[0]]["polls"] += 1
        self.send(200, self.batch(parts[0]))


@contextmanager
def serve(answer=None):
    """A vendor in a thread."""
    vendor = Vendor(answer)
    thread = threading.Thread(target=vendor.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield vendor
    finally:
        vendor.shutdown()
        vendor.server_close()


if __name__ == "__main__":
    with serve() as vendor:
        print(f"base_url {vendor.url}, key {KEY}", flush=True)
        try:
            time.sleep(10**6)
        except KeyboardInterrupt:
            pass
