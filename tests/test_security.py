"""What SECURITY.md promises, where no other test holds it."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import HOUSE, make_tiny, project_in, wait_for

from poetry_iter.core import UserError
from poetry_iter.engine import ModelSpec, open_engine

WATCH = """
import os, sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        at = args[1] if event != "socket.getaddrinfo" else args
        host = at[0] if isinstance(at, tuple) else ""
        if host not in ("", None, "localhost", "127.0.0.1", "::1", b"127.0.0.1") or (event == "socket.bind" and isinstance(at, tuple) and not host):
            with open(os.environ["WATCHED"], "a") as f: f.write(f"{event} {at!r} {sys.argv}\\n")
            raise OSError("no net in this test")
sys.addaudithook(hook)
"""
WRITE = """
from poetry_iter.descriptions import write_from
from poetry_iter.engine import ModelSpec, Sampling, open_engine
print(write_from(open_engine(ModelSpec()), [{"poem_id": "a", "description": "a gutter in October"}], Sampling(max_new_tokens=8)))
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Every Python that starts from here on notes whom it would speak to; gives what was noted."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    path, noted = os.pathsep.join([str(tmp_path / "watch"), str(HOUSE)]), tmp_path / "noted"
    for name in [n for n in os.environ if n.endswith("_PROXY") or n.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("WATCHED", str(noted))
    return lambda: noted.read_text() if noted.exists() else ""


def test_nothing_leaves_this_machine(house, watched, tmp_path_factory):
    asked = subprocess.run([sys.executable, "-c", "import socket; socket.create_connection(('example.org', 80), 1)"], capture_output=True)
    assert asked.returncode and "example.org" in watched()
    Path(os.environ["WATCHED"]).unlink()
    env = {"OMP_NUM_THREADS": "1"}
    make_tiny(folder := tmp_path_factory.mktemp("tiny"))
    for project, *args in ((project_in(folder), "run", "tiny", "--run", "w", "-p", "rounds=1"), (house, "poems", "check", "data/tiny_poems.jsonl"), (house, "check"),
                           *([(house, "run", "judge", "--run", "j", "-p", "limit=20"), (house, "run", "loop", "--run", "l")] if os.environ.get("SLOW") else [])):  # fmt: skip
        done = project.cli(*args, env=env)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", WRITE], cwd=house.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert watched() == ""


def test_what_listens_listens_here(tiny):
    process = tiny.start("run", "tiny", "--run", "a", "-p", "nap=20", "-p", "rounds=1")
    wait_for(tiny.run("a") / "round_001/2_add.running.ipynb", process)
    listening, end = [], time.monotonic() + 20
    while not listening and time.monotonic() < end:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        time.sleep(0.1)
    assert listening and set(listening) <= {"127.0.0.1", "::1"}


def calls(tree):
    return (n for n in ast.walk(tree) if isinstance(n, ast.Call))


def said(call, name):
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_no_pickle_is_opened():
    """In the package and in every stage: no module that unpickles, and the switch at each loader that could."""
    sources = {p: p.read_text() for p in (HOUSE / "poetry_iter").rglob("*.py")}
    for p in (HOUSE / "nbs").rglob("*.ipynb"):
        cells = [c for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code"]
        sources[p] = "\n".join(line for c in cells for line in "".join(c["source"]).split("\n") if not line.lstrip().startswith(("%", "!")))
    wrong, seen = [], 0
    for path, source in sources.items():
        tree = ast.parse(source)
        imports = {a.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} | {
            (n.module or "").partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
        }
        wrong += [f"{path}: {m}" for m in imports & {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}]
        for call in calls(tree):
            name = ast.unparse(call.func)
            seen += name == "torch.load"
            if name == "torch.load" and said(call, "weights_only") is not True:
                wrong.append(f"{path}: {ast.unparse(call)}")
            if name == "np.load" and said(call, "allow_pickle"):
                wrong.append(f"{path}: {ast.unparse(call)}")
            if said(call, "trust_remote_code") or name in ("yaml.load", "yaml.unsafe_load", "pd.read_pickle"):
                wrong.append(f"{path}: {ast.unparse(call)}")
    assert seen and not wrong, "\n".join(wrong)


class Order:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_that_is_a_pickle_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(HOUSE / "data/model", folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Order(tmp_path / "opened")))
    with pytest.raises(UserError):
        open_engine(ModelSpec(name=str(folder)))
    assert not (tmp_path / "opened").exists()


def test_every_promise_has_its_test():
    rows = [line for line in (HOUSE / "SECURITY.md").read_text().splitlines() if line.startswith("| **")]
    assert len(rows) >= 12
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert named, f"no test holds: {row[:80]}"
        for file, test in named:
            assert re.search(rf"^def {test}\(", (HOUSE / file).read_text(), re.M), f"{file} has no {test}"
