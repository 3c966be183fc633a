"""The runner and the command line, on a small experiment that needs no model."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from conftest import HOUSE, kill_all, wait_for

from poetry_iter.core import house as house_folder
from poetry_iter.core import workplace
from poetry_iter.pipeline.command_line import main
from poetry_iter.pipeline.experiments import get_experiment
from poetry_iter.pipeline.plans import plan_run

WHOLE = ["1_start.ipynb", "3_end.ipynb", "round_001/2_add.ipynb", "round_002/2_add.ipynb"]


def injected(path: Path) -> str:
    """The parameters that the runner gave."""
    return "".join(c.source for c in nbformat.read(path, 4).cells if "injected-parameters" in c.metadata.get("tags", []))


def test_a_run_from_start_to_report(tiny, finished_run):
    done = tiny.cli("run", "tiny", "--run", "a", "-p", "step=5", "-p", "note=007")
    assert (done.returncode, done.stdout) == (0, "outputs/a/report.html\n"), done.stderr
    assert tiny.notebooks("a") == WHOLE
    metrics = tiny.metrics("a")
    assert (metrics[1, "sum"], metrics[2, "sum"]) == (5, 10)
    assert metrics[1, "note"] == "007"  # a text stays a text
    assert metrics[0, "run_dir"] == "outputs/a" and metrics[0, "cwd"] == str(tiny.path)
    assert metrics[0, "python"] == sys.executable
    config = json.loads((tiny.run("a") / "config.json").read_text())
    assert config["experiment"] == "tiny" and config["seed"] == 0
    assert config["parameters"] == {"seed": 0, "step": 5, "nap": 0.0, "note": "007", "stop_after": 0, "rounds": 2}
    assert "step = 5" in injected(tiny.run("a") / WHOLE[2]) and "step" not in injected(tiny.run("a") / WHOLE[0])
    paths = nbformat.read(tiny.run("a") / WHOLE[2], 4).metadata.papermill
    assert paths.input_path == "nbs/tiny/2_add.ipynb" and paths.output_path.startswith("outputs/a/round_001/")

    # what is complete is passed over; what was taken away is made again
    before = {name: (tiny.run("a") / name).stat().st_mtime_ns for name in WHOLE}
    (tiny.run("a") / WHOLE[3]).unlink()
    done = tiny.cli("run", "tiny", "--run", "a", "-p", "step=5", "-p", "note=007")
    assert done.returncode == 0, done.stderr
    after = {name: (tiny.run("a") / name).stat().st_mtime_ns for name in WHOLE}
    assert [n for n in WHOLE if before[n] != after[n]] == [WHOLE[3]]
    assert tiny.metrics("a") == metrics

    # the machine has changed since: it is said
    config["versions"]["numpy"] = "1.0"
    (tiny.run("a") / "config.json").write_text(json.dumps(config))
    done = tiny.cli("run", "tiny", "--resume", "--run", "a")
    assert done.returncode == 0 and "run a goes on, with something else under it: numpy 1.0 (now " in done.stderr

    # other parameters under that name
    done = tiny.cli("run", "tiny", "--run", "a", "-p", "step=6")
    assert done.returncode == 2 and 'note "007" (now "")' in done.stderr and "step 5 (now 6)" in done.stderr
    assert tiny.metrics("a") == metrics

    # and side by side with another
    shutil.copytree(finished_run, tiny.run("b"))
    head, *listed = tiny.cli("runs").stdout.splitlines()
    assert head.split() == ["run", "date", "age", "experiment", "arm", "poems", "gain", "change", "state"]
    assert sorted((line.split()[0], line.split()[-1]) for line in listed) == [("a", "complete"), ("b", "complete")]
    table = [line.split()[-3:] for line in tiny.cli("runs", "compare", "a", "b").stdout.splitlines()]
    assert ["step", "5", "7"] in table and ["add/sum", "10", "7"] not in table
    assert ["add/sum", "10", "7"] in [line.split()[-3:] for line in tiny.cli("runs", "compare", "a", "b", "--all").stdout.splitlines()]


def test_an_experiment_in_a_folder_needs_no_change_to_the_library(folder_experiment):
    project, folder = folder_experiment
    done = project.cli("run", str(folder), "--dry-run", "-p", "bricks=3")
    assert done.returncode == 0, done.stderr
    assert "how high is the tower?" in done.stdout and "2_brick" in done.stdout and "lay 3 bricks" in done.stdout
    assert not (project.path / "outputs").exists(), "a dry run leaves nothing behind"
    done = project.cli("run", str(folder), "--run", "a", "-p", "bricks=3")
    assert (done.returncode, done.stdout) == (0, "outputs/a\n"), done.stderr  # it has no report
    assert project.metrics("a") == {(0, "height"): 0, (1, "height"): 2, (2, "height"): 4, (3, "height"): 6}
    last = project.cli("runs").stdout.splitlines()[-1].split()
    assert (last[0], last[-1]) == ("a", "complete") and str(folder) in last
    wrong = project.cli("run", str(folder), "-p", "bricks=10")
    assert wrong.returncode == 2 and "bricks: expected a number in [1, 9], found 10" in wrong.stderr
    (folder / "experiment.yaml").write_text("first: [1_base, 3_none]\n")
    assert "3_none.ipynb: there is no such file" in project.cli("run", str(folder)).stderr


def test_stages_that_declare_one_name_declare_it_alike(tiny):
    tiny.stage("3_end", "run_dir = 'x'  # folder\nrounds = 2  # [1, 99] how many\nstep = 1  # [1, inf) other", "print(run_dir, rounds, step)")
    done = tiny.cli("run", "tiny")
    assert done.returncode == 2 and "step: 2_add declares 1 in [0, inf), 3_end declares 1 in [1, inf); expected the same in both" in done.stderr


@pytest.mark.parametrize("name", ["loop", "embedded", "verse"])
def test_a_dry_run_of_every_experiment_is_a_plan(house, monkeypatch, name):
    monkeypatch.chdir(house.path)
    plan = plan_run(name)
    assert [s.stage for s in plan.steps] == list(get_experiment(name).stages)
    assert plan.dollars == 0 and all(s.rows is not None or s.text for s in plan.steps)
    assert "memory: " in str(plan) and not (house.path / "outputs").exists()


def test_a_plan_tells_the_time_of_an_earlier_run(tiny_with_run):
    done = tiny_with_run.cli("run", "tiny", "--dry-run", "-p", "rounds=4")
    assert done.returncode == 0 and "time: as long as b took" in done.stdout, done.stderr
    assert [p.name for p in (tiny_with_run.path / "outputs").iterdir()] == ["b"]


def test_the_loop_can_be_run_from_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workplace() == tmp_path and house_folder() == HOUSE
    assert plan_run("loop").steps and main(["runs"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_profile_by_name_and_by_file(tiny):
    folder = tiny.path / "nbs/tiny/profiles"
    folder.mkdir()
    (folder / "big.yaml").write_text(yaml.safe_dump({"step": 100, "rounds": 1}))
    (tiny.path / "mine.yaml").write_text("nap: 1e-2\nrounds: 1\n")
    done = tiny.cli("run", "tiny", "--run", "a", "--profile", "big", "-p", "step=3")
    assert done.returncode == 0, done.stderr
    assert tiny.metrics("a")[1, "sum"] == 3 and tiny.notebooks("a") == WHOLE[:3]
    done = tiny.cli("run", "tiny", "--run", "b", "--profile", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert json.loads((tiny.run("b") / "config.json").read_text())["parameters"]["nap"] == 0.01


def test_a_checkpoint_that_says_stop_ends_the_rounds(tiny):
    done = tiny.cli("run", "tiny", "--run", "a", "-p", "rounds=4", "-p", "stop_after=1")
    assert done.returncode == 0, done.stderr
    assert tiny.notebooks("a") == WHOLE[:3]


def test_a_stage_that_fails_and_is_mended(tiny):
    start = tiny.path / "nbs/tiny/1_start.ipynb"
    good = start.read_text()
    start.write_text(good.replace("open_run(run_dir).log", "1 / 0; open_run(run_dir).log"))
    done = tiny.cli("run", "tiny", "--run", "a", "-p", "rounds=1")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.splitlines()[-1] == "poetry-iter: stage 1_start failed: ZeroDivisionError: division by zero; see outputs/a/1_start.failed.ipynb"
    )
    assert tiny.notebooks("a") == ["1_start.failed.ipynb"]
    assert tiny.cli("runs").stdout.splitlines()[-1].endswith("failed in 1_start")

    start.write_text(good.replace("open_run(run_dir).log", "import os, signal; os.kill(os.getpid(), signal.SIGKILL); open_run(run_dir).log"))
    done = tiny.cli("run", "tiny", "--resume")
    assert done.returncode == 1 and "its kernel died" in done.stderr and "Traceback" not in done.stderr

    start.write_text(good)
    done = tiny.cli("run", "tiny", "--resume")
    assert done.returncode == 0, done.stderr
    assert tiny.notebooks("a") == WHOLE[:3]
    done = tiny.cli("run", "tiny", "--resume")
    assert done.returncode == 2 and "no unfinished run of tiny" in done.stderr


def test_an_interrupt_is_one_sentence_and_the_run_goes_on(tiny):
    process = tiny.start("run", "tiny", "--run", "a", "-p", "nap=60")
    wait_for(tiny.run("a") / "round_001/2_add.running.ipynb", process)
    second = tiny.cli("run", "tiny", "--run", "a", "-p", "nap=60")  # while the first is at work
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert second.returncode == 2 and "another runner is at work on it" in second.stderr
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "poetry-iter: interrupted in round 1 2_add; go on with: poetry-iter run tiny --resume --run a"
    assert "Traceback" not in err and tiny.notebooks("a") == ["1_start.ipynb"]
    assert kernels and not any(k.is_running() and k.status() != psutil.STATUS_ZOMBIE for k in kernels)


def test_a_runner_that_is_killed_and_resumed_leaves_the_same_bytes(tiny):
    nap = ("-p", "nap=2", "-p", "rounds=1")
    assert tiny.cli("run", "tiny", "--run", "alone", *nap).returncode == 0
    for name, moment in (("early", 0), ("later", 1.5)):
        process = tiny.start("run", "tiny", "--run", name, *nap)
        wait_for(tiny.run(name) / "round_001/2_add.running.ipynb", process)
        threading.Event().wait(moment)
        process.kill()  # the runner alone: its kernel has to notice
        process.communicate()
        done = tiny.cli("run", "tiny", "--resume", "--run", name)
        assert done.returncode == 0, done.stderr
        assert tiny.notebooks(name) == tiny.notebooks("alone")
        for file in ("metrics.jsonl", "checkpoints.jsonl"):
            alone, killed = ((tiny.run(run) / file).read_bytes() for run in ("alone", name))
            assert killed.replace(f"outputs/{name}".encode(), b"outputs/alone") == alone


def test_a_kernel_does_not_outlive_the_process_that_forked_it(tiny):
    """However that one ends: an orphan would hold the run's lock, and the pipe of whoever waits for the runner."""
    process = tiny.start("run", "tiny", "--run", "a", "-p", "nap=60", "-p", "rounds=1")
    wait_for(tiny.run("a") / "round_001/2_add.running.ipynb", process)
    end, kernels = time.monotonic() + 60, []
    while not kernels and time.monotonic() < end:
        forking = [p for p in psutil.Process(process.pid).children() if "kernels import serve" in " ".join(p.cmdline())]
        kernels = [k for p in forking for k in p.children()]
    assert kernels, "no kernel was forked"
    process.send_signal(signal.SIGSTOP)
    forking[0].kill()
    _, alive = psutil.wait_procs(kernels, timeout=20)
    assert not alive
    kill_all(process)


def test_another_kernel_of_that_name_is_not_used(tiny):
    tiny.order("first: [1_start]")
    folder = tiny.path / "jupyter/kernels/python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "wrong", "language": "python"}))
    done = tiny.cli(
        "run",
        "tiny",
        "--run",
        "a",
        env={"JUPYTER_PATH": str(tiny.path / "jupyter"), "JUPYTER_DATA_DIR": str(tiny.path / "jupyter")},
    )
    assert done.returncode == 0, done.stderr
    assert tiny.metrics("a")[0, "python"] == sys.executable


def test_a_terminal_sees_a_bar(tiny):
    tiny.order("first: [1_start, 3_end]")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = subprocess.Popen([sys.executable, tiny.script, "run", "tiny", "--run", "a"], cwd=tiny.path, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert process.wait() == 0
    text = seen.decode(errors="replace")
    assert "a: 0/2" in text and "a: 1/2" in text and "1_start" in text and "s left" in text and "Traceback" not in text


def test_help_is_quick_because_it_imports_nothing_heavy(tiny):
    code = "import sys; sys.argv[1:] = ['--help']; from poetry_iter.pipeline.command_line import main\ntry: main()\nexcept SystemExit: print(sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(json.loads(done.stderr.splitlines()[-1].replace("'", '"')))
    assert "run an experiment" in done.stdout
    assert "argparse" in loaded and not loaded & {"torch", "transformers", "papermill", "pandas", "matplotlib", "numpy", "peft", "trl", "yaml"}


def test_help_lists_the_parameters_that_the_stages_declare(tiny):
    done = tiny.cli("run", "tiny", "--help-parameters")
    assert done.returncode == 0 and not (tiny.path / "outputs").exists()
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert ["step", "1", "[0, inf) added a round"] in rows and "run_dir" not in done.stdout and "round " not in done.stdout


def test_a_reader_that_leaves_is_no_error(tiny):
    process = tiny.start("models")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0 and err == ""


def test_models_say_what_fits(house):
    rows = house.cli("models", "--vram", "24").stdout.splitlines()
    fits = {row.split()[0]: [word for word in row.split() if word in ("fits", "no")] for row in rows if "/" in row and row[0] != "G"}
    assert fits["Qwen/Qwen3-0.6B"] == ["fits"] * 4 and fits["Qwen/Qwen3-32B"] == ["no", "fits", "no", "no"]
    none = house.cli("models").stdout
    assert "fits" not in none and "Qwen/Qwen2.5-7B-Instruct" in none


def test_the_health_check_never_shows_a_key(house):
    done = house.cli("check", env={"ANTHROPIC_API_KEY": "sk-open-sesame", "HF_TOKEN": ""})
    assert "sesame" not in done.stdout + done.stderr
    rows = {line.split()[2]: line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert rows["ANTHROPIC_API_KEY"] == "ok" and rows["HF_TOKEN"] == "-"
    assert rows["transformers"] == rows["cpu"] == "ok" and done.returncode == 0


class Shelf(BaseHTTPRequestHandler):
    """What PoetryDB and Gutenberg would answer."""

    BOOK = "Title: Verses\n\nAuthor: A. Nobody\n\n*** START OF THE BOOK ***\n\n\n\nTHE KETTLE\n\nThe kettle hums upon the hob,\n  the cat is on the mat,\nthe rain comes down the chimney pot,\n  and that, my dear, is that.\n\n\n\n*** END OF THE BOOK ***\n"
    POEMS = ({"title": "The Kettle", "author": "A. Nobody", "lines": ["The kettle hums upon the hob,", "the cat is on the mat."]},)

    def do_GET(self):
        answers = {
            "/cache/epub/7/pg7.txt": self.BOOK,
            "/author/A.%20Nobody/title,author,lines.json": json.dumps(self.POEMS),
            "/author/Nobody%20Else/title,author,lines.json": '{"status":404}',
        }
        found = answers.get(self.path)
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, *_): ...


@pytest.fixture
def shelf():
    server = HTTPServer(("127.0.0.1", 0), Shelf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_poems_are_fetched_and_checked(tmp_path, shelf, capsys):
    for what, name in (("A. Nobody", "author.jsonl"), ("7", "book.jsonl")):
        out = tmp_path / name
        assert main(["poems", "fetch", what, "--out", str(out), "--base-url", shelf]) == 0
        (row,) = [json.loads(line) for line in out.read_text().splitlines()]
        assert row["title"] == "The Kettle" and row["author"] == "A. Nobody" and row["content"].startswith("The kettle hums")
        assert row["source"].startswith(shelf)
        assert main(["poems", "check", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 kept in 1 families of near-duplicates, 0 dropped"


@pytest.mark.parametrize("what", ["Nobody Else", "8"])
def test_what_cannot_be_fetched_is_said_and_nothing_written(tmp_path, shelf, capsys, what):
    assert main(["poems", "fetch", what, "--out", str(tmp_path / "x.jsonl"), "--base-url", shelf]) == 2
    assert shelf in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_network_is_said(tmp_path, capsys):
    assert main(["poems", "fetch", "Nobody", "--out", str(tmp_path / "x.jsonl"), "--base-url", "http://127.0.0.1:9"]) == 2
    assert "cannot be fetched" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_poems_check_says_what_is_dropped_and_alike(tmp_path, capsys):
    lines = [f"line {i} of the song about the {w} in the town" for i, w in enumerate(("rain", "bells", "dogs", "lamps", "snow", "boats"))]
    rows = [
        {"title": "Song", "content": "\n".join(lines)},
        {"title": "Song, again", "content": "\n".join([*lines[:-1], "and a last line of its own"])},
        {"title": "Song, copied", "content": "\n".join(lines)},
        {"title": "Marked", "content": "a<br>b"},
        {"title": "", "content": "no name"},
        {"title": "Other", "content": "nothing here is like it\nat all"},
    ]
    path = tmp_path / "poems.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["poems", "check", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "3 kept in 2 families of near-duplicates, 3 dropped"
    assert "alike    Song | Song, again" in said
    assert [f"{path}, line {n}" in line for n, line in zip((3, 4, 5), said)] == [True] * 3
    assert "the same poem as" in said[0] and "HTML" in said[1] and "title" in said[2]


def test_verse_reads_a_file(tmp_path, capsys):
    path = tmp_path / "poem.txt"
    path.write_text("The cat sat on the mat\nand wore a yellow hat\n")
    assert main(["verse", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rhyme"]["scheme"] == "AA"
    assert main(["verse", str(tmp_path / "none.txt")]) == 2
