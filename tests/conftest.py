"""What the tests share: a small experiment of three stages in a project of its own, and the command line run on it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
import pytest

from poetry_iter.pipeline.command_line import main

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
        """The command line: in this process, which saves the imports; in one of its own where the environment or the script is another."""
        if kwargs or self.script.name != "command.py":
            process = self.start(*args, **kwargs)
            out, err = process.communicate()
            return subprocess.CompletedProcess(args, process.returncode, out, err)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.path), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(list(args))
            except SystemExit as e:
                status = e.code
        return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())

    def order(self, text: str) -> None:
        """Another order of the small experiment's stages."""
        (self.path / "nbs/tiny/experiment.yaml").write_text(text)

    def stage(self, name: str, *sources: str, folder: Path | None = None) -> None:
        """Write a stage of the small experiment, or of one in a folder; a source that begins with # is text."""
        cells = [nbformat.v4.new_markdown_cell(s) if s.startswith("#") else nbformat.v4.new_code_cell(s) for s in sources]
        cells[0].metadata["tags"] = ["parameters"]
        folder = folder or self.path / "nbs/tiny"
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")

    def run(self, name: str) -> Path:
        return self.path / "outputs" / name

    def notebooks(self, name: str) -> list[str]:
        return sorted(str(f.relative_to(self.run(name))) for f in self.run(name).rglob("*.ipynb"))

    def metrics(self, name: str) -> dict:
        rows = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]
        return {(r["round"], r["name"]): r["value"] for r in rows}


def make_tiny(folder: Path) -> None:
    """A project with the small experiment, which needs no model."""
    assert not (folder / "settings.ini").is_symlink(), f"{folder} is a view of the house: what is written there is written into it"
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    project = Project(folder, folder / "command.py")
    for name, sources in STAGES.items():
        project.stage(name, *sources)
    (folder / "nbs/tiny/experiment.yaml").write_text(EXPERIMENT)


def link_house(folder: Path) -> None:
    """The real notebooks and data, seen from a root of its own, so that outputs/ is the test's."""
    for name in ("settings.ini", "nbs", "data"):
        (folder / name).symlink_to(HOUSE / name)


def project_in(folder: Path) -> Project:
    (folder / "command.py").write_text(COMMAND)
    return Project(folder, folder / "command.py")


@pytest.fixture
def tiny(tmp_path):
    """A project with the small experiment."""
    make_tiny(tmp_path)
    project = project_in(tmp_path)
    yield project
    project.end()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of the small experiment that is complete: made once, for all who need one."""
    folder = tmp_path_factory.mktemp("finished")
    make_tiny(folder)
    project = project_in(folder)
    done = project.cli("run", "tiny", "--run", "b", "-p", "step=7", "-p", "rounds=1")
    assert done.returncode == 0, done.stderr
    return project.run("b")


@pytest.fixture
def tiny_with_run(tiny, finished_run):
    """A project with the small experiment, and the run `b` of it."""
    shutil.copytree(finished_run, tiny.run("b"))
    return tiny


@pytest.fixture
def folder_experiment(tmp_path_factory):
    """A place to work in that is no project, and an experiment of two stages in a folder elsewhere."""
    place, folder = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("tower")
    project = project_in(place)
    (folder / "experiment.yaml").write_text(
        "question: how high is the tower?\nfirst: [1_base]\neach: [2_brick]\nrounds: bricks\nestimate:\n  1_base: {rows: 1, tokens: 0}\n"
    )
    log = "from poetry_iter.runs import open_run\nopen_run(run_dir).log"
    project.stage("1_base", "run_dir = 'x'  # folder of the run", f"{log}(0, 'base', {{'height': 0}})", folder=folder)
    project.stage(
        "2_brick",
        "run_dir = 'x'  # folder of the run\nround = 1  # the first is 1\nbricks = 3  # [1, 9] to lay",
        "## Plan",
        "f'lay {bricks} bricks'",
        "## Work",
        f"{log}(round, 'brick', {{'height': 2 * round}})",
        folder=folder,
    )
    yield project, folder
    project.end()


@pytest.fixture
def house(tmp_path):
    """The real notebooks and data."""
    link_house(tmp_path)
    project = project_in(tmp_path)
    yield project
    project.end()


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a runner, its kernel and all that they started, at one moment."""
    process.send_signal(signal.SIGSTOP)  # or it would note its kernel's end
    for child in psutil.Process(process.pid).children(recursive=True):
        os.kill(child.pid, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=60)  # nothing that it started holds its pipes


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until a file is there; fails when the process ends before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


LONGEST = ("test_resume.py", "test_bad_input.py", "test_embedded.py", "test_pipeline.py", "test_soak.py", "test_workshop.py")  # files that begin first, so that no process works alone at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if os.environ.get("SLOW"):
        for item in items:
            item.add_marker(pytest.mark.timeout(2 * 3600))
