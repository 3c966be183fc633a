"""What the tests share: a small experiment of three stages in a project of its own, and the command line run on it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
import pytest

HOUSE = Path(__file__).resolve().parents[1]
COMMAND = "import sys\nfrom poetry_iter.pipeline.command_line import main\nsys.exit(main())\n"
EXPERIMENT = "question: what is the sum?\nfirst: [1_start]\neach: [2_add]\nlast: [3_end]\nrounds: rounds\n"
STAGES = {
    "1_start": [
        "run_dir = 'outputs/by-hand'  # the run's folder\nseed = 0  # of everything",
        "import os, sys\nfrom poetry_iter.runs import open_run",
        "open_run(run_dir).log(0, 'start', {'seed': seed, 'run_dir': run_dir, 'cwd': os.getcwd(), 'python': sys.executable})",
    ],
    "2_add": [
        "run_dir = 'outputs/by-hand'  # the run's folder\nround = 1  # the first is 1\nstep = 1  # [0, inf) added a round\nnap = 0.0  # seconds\nnote = ''  # anything\nstop_after = 0  # a round",
        "import time\nfrom poetry_iter.runs import open_run",
        "run = open_run(run_dir)\nrun.log(round, 'add', {'sum': round * step, 'note': note})",
        "time.sleep(nap)",
        "run.add_checkpoint({'name': f'round_{round:03d}', 'stop': round == stop_after})",
    ],
    "3_end": [
        "run_dir = 'outputs/by-hand'  # the run's folder\nrounds = 2  # [1, 99] how many",
        "from poetry_iter.core import write_text",
        "write_text(f'{run_dir}/report.html', 'done')",
    ],
}


def heed_interrupts() -> None:
    """A test run in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Project:
    """A folder with settings.ini, and `poetry-iter` run in it."""

    path: Path
    script: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *args: str, **kwargs) -> subprocess.Popen:
        env = {**os.environ, **kwargs.pop("env", {})}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heed_interrupts}
        self.started.append(subprocess.Popen([sys.executable, self.script, *args], cwd=self.path, env=env, **pipes, **kwargs))
        return self.started[-1]

    def end(self) -> None:
        """Nothing outlives its test."""
        for process in self.started:
            if process.poll() is None:
                kill_all(process)

    def cli(self, *args: str, **kwargs) -> subprocess.CompletedProcess:
        process = self.start(*args, **kwargs)
        out, err = process.communicate()
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def stage(self, name: str, *sources: str) -> None:
        """Write a stage of the small experiment."""
        cells = [nbformat.v4.new_code_cell(s) for s in sources]
        cells[0].metadata["tags"] = ["parameters"]
        folder = self.path / "nbs/tiny"
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")

    def run(self, name: str) -> Path:
        return self.path / "outputs" / name

    def notebooks(self, name: str) -> list[str]:
        return sorted(str(f.relative_to(self.run(name))) for f in self.run(name).rglob("*.ipynb"))

    def metrics(self, name: str) -> dict:
        rows = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]
        return {(r["round"], r["name"]): r["value"] for r in rows}


@pytest.fixture
def tiny(tmp_path):
    """A project with the small experiment, which needs no model."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "command.py").write_text(COMMAND)
    project = Project(tmp_path, tmp_path / "command.py")
    for name, sources in STAGES.items():
        project.stage(name, *sources)
    (tmp_path / "nbs/tiny/experiment.yaml").write_text(EXPERIMENT)
    yield project
    project.end()


@pytest.fixture
def house(tmp_path):
    """The real notebooks and data, seen from a root of its own, so that outputs/ is the test's."""
    for name in ("settings.ini", "nbs", "data"):
        (tmp_path / name).symlink_to(HOUSE / name)
    (tmp_path / "command.py").write_text(COMMAND)
    project = Project(tmp_path, tmp_path / "command.py")
    yield project
    project.end()


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a runner, its kernel and all that they started, at one moment."""
    process.send_signal(signal.SIGSTOP)  # or it would note its kernel's end
    for child in psutil.Process(process.pid).children(recursive=True):
        os.kill(child.pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until a file is there; fails when the process ends before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)
