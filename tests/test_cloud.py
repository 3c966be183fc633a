"""cloud/: as far as it can be looked at without an account. What needs modal or sky skips where they are not installed."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest
import yaml

from poetry_iter.core import root
from poetry_iter.pipeline.command_line import parser

CLOUD = root() / "cloud"


def test_the_dockerfile_is_up_to_date():
    "It is made from settings.ini, which alone names dependencies."
    said = subprocess.run([sys.executable, CLOUD / "dockerfile.py", "--check"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    text = (CLOUD / "Dockerfile").read_text()
    assert re.findall(r"^FROM .* AS (\w+)$", text, re.M) == ["base", "cpu", "cuda"] and "unsloth==" in text and "'torch~=" in text


def test_the_sky_task_calls_what_there_is():
    "Its commands parse as ours do, its profile exists, and its keys are SkyPilot's."
    task = yaml.safe_load((CLOUD / "sky.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "secrets", "setup", "run"}
    line = re.sub(r'"?\$(\w+)"?', lambda m: task["envs"][m[1]], task["run"].splitlines()[0]).split()
    args = parser().parse_args(line[1:])
    assert (root() / "nbs" / args.experiment / "profiles" / f"{args.profile}.yaml").is_file() and (root() / task["envs"]["POEMS"]).is_file()


def test_the_modal_app_calls_what_there_is():
    "Its command lines, taken out of the file, parse as ours do."
    tree = ast.parse((CLOUD / "modal_app.py").read_text())
    [function] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "command_lines"]
    names: dict = {}
    exec("import shlex\nfrom pathlib import PurePosixPath\n" + ast.unparse(function), names)
    run, check = names["command_lines"]("loop", "qwen3-8b-qlora", "qwen", "somewhere/mine.jsonl", "limit=8 seed=1", "check")
    args = parser().parse_args(run[1:])
    assert args.set == ["poems=poems/mine.jsonl", "limit=8", "seed=1"] and args.run == "qwen" and parser().parse_args(check[1:])


@pytest.mark.skipif(importlib.util.find_spec("modal") is None, reason="modal is not installed")
def test_the_modal_app_imports():
    said = subprocess.run([sys.executable, "-c", "import modal_app; print(type(modal_app.work).__name__, type(modal_app.main).__name__)"], cwd=CLOUD, capture_output=True, text=True)
    assert said.stdout.split() == ["Function", "LocalEntrypoint"], said.stderr


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="skypilot is not installed")
def test_the_sky_task_parses():
    said = subprocess.run([sys.executable, "-c", "import sky; t = sky.Task.from_yaml('sky.yaml'); print(t.name, sorted(t.envs))"], cwd=CLOUD, capture_output=True, text=True)
    assert said.stdout.startswith("poetry-iter"), said.stderr
