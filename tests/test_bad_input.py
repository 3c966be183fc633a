"""A user's mistake: one sentence that names what, where, found and expected; exit status 2; nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import HOUSE

from poetry_iter.core import UserError
from poetry_iter.pipeline.command_line import main
from poetry_iter.pipeline.parameters import check_model


def row(title="A", content="one line\nand another"):
    return json.dumps({"title": title, "content": content}) + "\n"


POEM_FILES = {  # name: (content, what the sentence says)
    "empty.jsonl": ("", "no poem in it"),
    "latin.jsonl": (f"{row()}caf\u00e9\n".encode("latin-1"), "not UTF-8 (byte"),
    "half.jsonl": (row() + row()[:20], "line 2: not a whole JSON object"),
    "untitled.jsonl": (row() + json.dumps({"content": "a poem"}) + "\n", "line 2: no title"),
    "blank.jsonl": (row(title=" "), "line 1: `title` is empty"),
    "no-text.jsonl": (row() + "\n" + json.dumps({"title": "B"}) + "\n", "line 3: no poem"),
    "number.jsonl": (json.dumps({"title": "B", "content": 7}), "line 1: `content` is int, expected text"),
    "list.jsonl": ("[1, 2]\n", "line 1: expected a JSON object"),
    "empty.csv": ("title,content\n", "no poem in it"),
    "wrong.doc": ("a poem", "poems are .jsonl, .json, .txt, .csv, .tsv, .parquet or .arrow files, found '.doc'"),
    "columns.csv": ("title,stanza\nA,b\n", "no column for the poem; found title, stanza"),
    "html.jsonl": (row(content="a<br>b"), "HTML"),
    "object.json": ("[1]", "row 1: expected an object"),
    "not-a-number.jsonl": (row()[:-2] + ', "score": NaN}', "line 1: `score` holds what is no JSON"),
    "surrogate.jsonl": (row(content="a \ud800 b"), "line 1: `content` holds what is no JSON"),
    "surrogate-extra.jsonl": (row()[:-2] + ', "note": "\\ud83d"}', "line 1: `note` holds what is no JSON"),
    "zero-width.jsonl": (row(title="\u200b"), "line 1: `title` is empty"),
    "no-words.jsonl": (row(content="\U0001f339\U0001f339"), "line 1: `content` has no word in it"),
    "huge.jsonl": (row()[:-2] + ', "n": ' + "9" * 5000 + "}", "line 1: JSON that cannot be read here"),
    "deep.json": ("[" * 100_000, "JSON that cannot be read here"),
}
SETTINGS = {  # what is given: what the sentence says
    "num_candidates=0": "num_candidates: expected 1 or more, found 0",
    "num_candidates=-1": "num_candidates: expected 1 or more, found -1",
    "top_k=5": "top_k: expected at most num_candidates (4), found 5",
    "top_k=0": "top_k: expected 1 or more",
    "temperature=-0.1": "temperature: expected 0 or more, found -0.1",
    "temperature=warm": "temperature: expected a number, found 'warm'",
    "temperature=nan": "temperature: expected a finite number",
    "top_p=0": "top_p: expected a share in (0, 1]",
    "top_p=1.1": "top_p: expected a share in (0, 1], found 1.1",
    "max_iterations=0": "max_iterations: expected 1 or more",
    "max_iterations=2.5": "max_iterations: expected a whole number, found '2.5'",
    "max_iterations=": "max_iterations: expected a whole number, found ''",
    "resamples_per_iteration=0": "resamples_per_iteration: expected 1 or more",
    "learning_rate=0": "learning_rate: expected more than 0",
    "learning_rate=inf": "learning_rate: expected a finite number",
    "held_out=1": "held_out: expected a share in [0, 1)",
    "held_out=-0.5": "held_out: expected a share in [0, 1)",
    "train_batch_size=0": "train_batch_size: expected 1 or more",
    "seed=-1": "seed: expected 0 or more",
    "guard=maybe": "guard: expected true or false, found 'maybe'",
    "arm=best": "arm: expected one of topk, random, worst, all, found 'best'",
    "score=contrasts": "(did you mean contrast?)",
    "learn=read": "learn: expected one of write, write+describe",
    "engine=llama": "engine: expected one of transformers, unsloth",
    "renderer=raw": "renderer: expected one of base, chat, thinking",
    "on_collapse=panic": "on_collapse: expected one of continue, stop, rollback",
    "load_in_4bit=true": "load_in_4bit: expected engine unsloth",
    "num_candidate=4": "no stage declares it (did you mean num_candidates?)",
    "round=2": "round: the runner gives it",
    "run_dir=x": "run_dir: the runner gives it",
    "num_candidates": "expected name=value",
    "poems=nowhere.jsonl": "nowhere.jsonl: there is no such file",
    "poems=nbs/loop": "no .jsonl, .json, .txt, .csv, .tsv, .parquet or .arrow file in this folder",
    "model=data/nowhere": "model data/nowhere: there is no such folder",
    "model=nowhere": "model nowhere: there is no such folder",
    "model=nbs": "the folder has no config",
    "model=settings.ini": "model settings.ini: a file",
    "model=": "model: expected a folder or a name on the hub, found nothing",
    "poems=../data/tiny_poems.jsonl": "../data/tiny_poems.jsonl: there is no such file",
    f"poems={'a' * 300}.jsonl": "File name too long",
    "only=nowhere.json": "nowhere.json: there is no such file",
    "only=data/tiny_poems.jsonl": "not JSON",
    "only=data/model/heldout.json#nowhere": "no list 'nowhere' in it",
    "only=data/model/config.json": "expected a list of poem ids",
    "only=data/model/heldout.json#loop": "it names none of the 67 poems",
    "micro_batch_size=6": "micro_batch_size: expected a divisor of train_batch_size (8), found 6",
    "seed=2024-13-45": "seed: expected a whole number, found '2024-13-45'",
    f"seed={'9' * 5000}": "seed: expected a whole number",
    f"temperature=1{'0' * 400}": "temperature: expected a",
    f"limit={'[' * 3000}": "limit: expected a whole number",
}


@pytest.fixture
def refused(house, monkeypatch, capsys):
    """Runs the command line, which must refuse in one sentence and write nothing; gives the sentence."""
    monkeypatch.chdir(house.path)
    before = sorted(house.path.iterdir())

    def refuse(*args):
        assert main([str(a) for a in args]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("poetry-iter: ") and said.err.count("\n") == 1
        assert sorted(house.path.iterdir()) == before, "something was written"
        return said.err

    return refuse


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_parameter(refused, setting):
    assert SETTINGS[setting] in refused("run", "loop", "-p", setting)


@pytest.mark.parametrize("name", POEM_FILES)
def test_a_wrong_poem_file(refused, tmp_path_factory, name):
    content, expected = POEM_FILES[name]
    path = tmp_path_factory.mktemp("poems") / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused("run", "loop", "-p", f"poems={path}")
    assert expected in said and str(path) in said


def test_a_wrong_experiment_profile_or_run(refused, tmp_path_factory):
    assert "(did you mean loop?)" in refused("run", "lop")
    assert "neither a file nor a profile" in refused("run", "loop", "--profile", "nowhere")
    folder = tmp_path_factory.mktemp("profiles")
    for content, expected in (
        ("a: [1", "not yaml"),
        ("- a\n- b\n", "expected lines of"),
        ("tok_k: 1\n", "(did you mean top_k?)"),
        ("top_k: two\n", "top_k: expected a whole number, found 'two'"),
        ("seed: 2024-13-45\n", "not yaml that can be read: month must be in 1..12"),
        ("a: " + "[" * 3000, "not yaml that can be read"),
    ):
        (folder / "mine.yaml").write_text(content)
        assert expected in refused("run", "loop", "--profile", folder / "mine.yaml")
    for name in ("../up", "a/b", "", "-p", "a b"):
        assert "expected a name of at most 100 letters" in refused("run", "loop", f"--run={name}")
    assert "at most 100 letters" in refused("run", "loop", "--run", "a" * 300)
    assert "choose another --run" in refused("run", "loop", "--run", "reference")
    assert "neither a file nor a profile" in refused("run", "loop", "--profile", "")
    assert "there is none to resume" in refused("run", "loop", "--resume", "--run", "nowhere")
    assert "no unfinished run" in refused("run", "loop", "--resume")
    assert "there is no folder outputs/nowhere" in refused("runs", "compare", "nowhere", "nowhere-2")
    assert "more than 0, found -1" in refused("models", "--vram", "-1")
    assert "no such file" in refused("poems", "check", "nowhere.jsonl")
    assert "are 1 or more" in refused("poems", "check", "data/tiny_poems.jsonl", "--max-tokens", "0")
    assert "more than 0, found nan" in refused("models", "--vram", "nan")
    assert "nothing was written" in refused("poems", "fetch", "Keats", "--out", "keats.jsonl", "--base-url", "nonsense")
    assert "ends in .jsonl" in refused("poems", "fetch", "Keats", "--out", "keats.txt")


def test_outside_of_the_project(tmp_path, monkeypatch, capsys):
    """What comes with the package is found; what a person names is looked for where the person stands."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", "loop", "-p", "poems=mine.jsonl"]) == 2
    assert f"{tmp_path}/mine.jsonl: there is no such file" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_model_folder_that_is_not_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(HOUSE)
    model = tmp_path / "model"
    shutil.copytree(HOUSE / "data/model", model)
    check_model(str(model))
    weights = next(model.glob("*.safetensors"))
    whole = weights.read_bytes()
    for content, expected in ((whole[:-10], "the file was cut off"), (b"", "not a safetensors file"), (b"\xff" * 100, "not a safetensors file")):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=expected):
            check_model(str(model))
    weights.write_bytes(whole)
    for patterns, expected in (
        (["tokenizer.json", "vocab.json"], "no tokenizer"),
        (["*.safetensors", "*.bin"], "no weights"),
        (["config.json"], "no config"),
    ):
        for f in [f for p in patterns for f in model.glob(p)]:
            f.unlink()
        with pytest.raises(UserError, match=expected):
            check_model(str(model))


def test_a_model_folder_with_a_part_of_its_weights(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    from poetry_iter.engine import ModelSpec, open_engine

    monkeypatch.chdir(HOUSE)
    model = tmp_path / "model"
    shutil.copytree(HOUSE / "data/model", model)
    weights = load_file(model / "model.safetensors")
    whole = (model / "model.safetensors").read_bytes()
    save_file({k: v for k, v in weights.items() if ".layers.2." not in k}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="11 of its weights are missing, as model"):
        open_engine(ModelSpec(name=str(model)))
    (model / "model.safetensors").write_bytes(whole)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the folder cannot be loaded"):
        open_engine(ModelSpec(name=str(model)))


def test_poems_check_says_what_the_loop_would_keep(house, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(house.path)
    rows = [row("Short"), row("Long", "\n".join(f"the {n} of {n}" for n in range(800))), row("\x1b[31mRed\nred\ud83d", "a \ud800")]
    (tmp_path / "poems.jsonl").write_text("".join(rows))
    assert main(["poems", "check", str(tmp_path / "poems.jsonl")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "over max_tokens 2048" in said[1] and "Long" in said[1] and "\x1b" not in said[0] and "Red red" in said[0].replace("[31m", "")
    assert said[-1] == "1 kept in 1 families of near-duplicates, 2 dropped"


def test_a_broken_run_does_not_hide_the_others(tiny_with_run):
    tiny = tiny_with_run
    config = (tiny.run("b") / "config.json").read_text()
    for n, content in enumerate((config[:40], "", "[]", "null", "{}", '{"experiment": "tiny"}')):
        folder = tiny.path / f"outputs/broken{n}"
        folder.mkdir()
        (folder / "config.json").write_text(content)
        done = tiny.cli("run", "tiny", "--run", folder.name)
        assert done.returncode == 2 and "config.json" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert (folder / "config.json").read_text() == content
    listed = tiny.cli("runs").stdout
    assert listed.count("cannot be read") == 6 and "complete" in listed
    assert "no unfinished run" in tiny.cli("run", "tiny", "--resume").stderr
    (tiny.run("b") / "metrics.jsonl").write_text("[1]\n")
    done = tiny.cli("runs", "compare", "b", "b")
    assert done.returncode == 2 and "metrics.jsonl, line 1: expected a JSON object" in done.stderr


def run_loop(house, name, poems, *settings):
    path = house.path / "poems.jsonl"
    path.write_text("".join(poems))
    small = ["num_candidates=2", "top_k=1", "max_iterations=1", "written_poems=1", "poem_tokens=32", f"poems={path}"]
    return house.cli("run", "loop", "--run", name, *[x for s in (*small, *settings) for x in ("-p", s)])


def test_poems_longer_than_the_context(house):
    long = [row(f"Long {i}", "\n".join(f"line {n} of poem {i} goes on and on" for n in range(2000))) for i in range(3)]
    done = run_loop(house, "long", long)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "poems.jsonl: " in done.stderr.splitlines()[-1] and "0 of 3 poems can be used (3 are longer than max_tokens)" in done.stderr
    assert not (house.run("long") / "poems.jsonl").exists()


def test_every_candidate_of_every_poem_is_cut(house):
    short = [row(f"Poem {i}", f"the {w} is here\nand then it is gone\nas the {w} was") for i, w in enumerate("rain sun moon wind".split())]
    done = run_loop(house, "cut", short, "description_tokens=1")
    ledger = [json.loads(line) for line in (house.run("cut") / "round_001/ledger.jsonl").read_text().splitlines()]
    assert ledger and {r["ended"] for r in ledger} == {"cut"} and not {"winner"} & {r["verdict"] for r in ledger}
    assert done.returncode == 2 and "nothing to train on" in done.stderr.splitlines()[-1]


def test_a_run_refused_in_its_first_stage_gives_its_name_back(tiny):
    tiny.stage(
        "1_start",
        "run_dir = 'x'  # folder\nseed = 0  # of everything",
        "from poetry_iter.core import UserError, write_text",
        "write_text(f'{run_dir}/kept.txt', 'x') if seed == 2 else None",
        "if seed: raise UserError('no seed will do')\nprint(run_dir)",
    )
    tiny.order("first: [1_start]")
    done = tiny.cli("run", "tiny", "--run", "a", "-p", "seed=1")
    assert done.returncode == 2 and "no seed will do" in done.stderr
    assert not tiny.run("a").exists() and "no unfinished run" in tiny.cli("run", "tiny", "--resume").stderr
    assert tiny.cli("run", "tiny", "--run", "a", "-p", "seed=2").returncode == 2
    assert [p.name for p in tiny.run("a").iterdir()] == ["kept.txt"]
    done = tiny.cli("run", "tiny", "--run", "a")  # the same name, other parameters
    assert done.returncode == 0, done.stderr
    assert not list(tiny.run("a").rglob(".lock"))


def test_what_a_killed_runner_leaves_is_taken_away(tiny):
    tiny.run("a").mkdir(parents=True)
    for name in ("2_add.running.ipynb", ".lock"):
        (tiny.run("a") / name).write_text("")
    tiny.order("first: [1_start]")
    assert tiny.cli("run", "tiny", "--run", "a").returncode == 0
    assert not [p for p in tiny.run("a").rglob("*") if p.name.endswith((".running.ipynb", ".lock"))]


BROKEN_HOUSES = {  # what is broken: (file, content, what the sentence says)
    "a stage that is a list": ("nbs/tiny/2_add.ipynb", "[]", "2_add.ipynb: not a notebook"),
    "a stage that is cut": ("nbs/tiny/2_add.ipynb", '{"cells": [', "2_add.ipynb, line 1: not JSON"),
    "parameters that are no Python": (
        "nbs/tiny/1_start.ipynb",
        '{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = ("}]}',
        "1_start.ipynb: the parameters cell is not Python",
    ),
    "a domain that there is not": (
        "nbs/tiny/1_start.ipynb",
        '{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = 0  # {selection.LEGS} x"}]}',
        "poetry_iter has nothing of that name",
    ),
    "no order": ("nbs/tiny/experiment.yaml", "question: why\n", "no stage in it"),
    "a word that there is not": ("nbs/tiny/experiment.yaml", "first: [1_start]\nround: 2\n", "round: no such line (did you mean rounds?)"),
    "rounds that nobody declares": ("nbs/tiny/experiment.yaml", "first: [1_start]\neach: [2_add]\nrounds: laps\n", "expression 'laps'"),
    "a run without parameters": (
        "outputs/a/config.json",
        '{"experiment": "tiny", "parameters": {}}',
        "config.json: no nap, note, rounds, seed, step, stop_after among its parameters",
    ),
    "a .env that is no text": (".env", b"KEY=caf\xe9\n", ".env: not UTF-8"),
    "outputs that is a file": ("outputs", "", "outputs: no folder that can be written"),
}


@pytest.mark.parametrize("case", BROKEN_HOUSES)
def test_a_broken_house_is_told_in_a_sentence(tiny, capsys, monkeypatch, case):
    file, content, told = BROKEN_HOUSES[case]
    (tiny.path / file).parent.mkdir(parents=True, exist_ok=True)
    (tiny.path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tiny.path)
    assert main(["run", "tiny", "--run", "a", *(["--resume"] if file.startswith("outputs/") else [])]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1, said


@pytest.mark.parametrize("threads", ["4,2", "none", "0", "-1"])
def test_threads_that_are_no_number(tiny, capsys, monkeypatch, threads):
    monkeypatch.chdir(tiny.path)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert main(["run", "tiny", "--run", "a"]) == 2 and f"found '{threads}'" in capsys.readouterr().err
    assert not tiny.run("a").exists()


def test_a_run_that_is_a_link(tiny, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tiny.path / "outputs").mkdir()
    for name, target in (("there", elsewhere), ("nowhere", elsewhere / "none"), ("itself", tiny.run("itself"))):
        tiny.run(name).symlink_to(target)
    tiny.order("first: [3_end]")
    assert tiny.cli("run", "tiny", "--run", "there").stdout == "outputs/there/report.html\n" and (elsewhere / "report.html").exists()
    for name in ("nowhere", "itself"):
        done = tiny.cli("run", "tiny", "--run", name)
        assert done.returncode == 2 and "cannot be made" in done.stderr and done.stderr.count("\n") == 1


def test_a_closed_standard_output(tiny):
    done = subprocess.run(f"exec {sys.executable} {tiny.script} runs >&-", shell=True, cwd=tiny.path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("template", ["{{ unclosed", "{{ raise_exception('no') }}", "{{ messages[9].x.y }}"])
def test_a_broken_chat_template(tmp_path, monkeypatch, template):
    from transformers import AutoTokenizer

    from poetry_iter.renderers import get_renderer

    model = tmp_path / "model"
    shutil.copytree(HOUSE / "data/model", model)
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="its chat template fails"):
        get_renderer("chat", AutoTokenizer.from_pretrained(model))
    if "unclosed" not in template:  # seen before any work; one that cannot be compiled is left to transformers
        with pytest.raises(UserError, match="its chat template fails"):
            check_model(str(model), {"renderer": "chat"})


def test_write_refuses_an_output_before_it_works(house, monkeypatch, capsys):
    monkeypatch.chdir(house.path)
    (house.path / "poems").mkdir()
    for out, told in (
        ("poems", "a folder, where a file was expected"),
        ("new/", "a folder, where a file was expected"),
        ("settings.ini/poem.json", "settings.ini is no folder"),
    ):
        assert main(["write", "a poem about a lock", "--out", out]) == 2 and told in capsys.readouterr().err


def test_no_key_in_a_notebook(tiny):
    secret = "sk-open-sesame-0123456789"
    tiny.order("first: [1_start]")
    tiny.stage(
        "1_start",
        "run_dir = 'x'  # folder\nseed = 0  # of everything",
        "import os",
        "print(run_dir, os.environ['SOME_API_KEY'])",
        "if seed: raise ValueError('401: the key ' + os.environ['SOME_API_KEY'])",
    )
    env = {"SOME_API_KEY": secret}
    failed = tiny.cli("run", "tiny", "--run", "a", "-p", "seed=1", env=env)
    assert failed.returncode == 1 and "401: the key …" in failed.stderr
    assert tiny.cli("run", "tiny", "--run", "b", env=env).returncode == 0
    assert "401: the key …" in (tiny.run("a") / "1_start.failed.ipynb").read_text()
    files = [p for p in (tiny.path / "outputs").rglob("*") if p.is_file()]
    assert len(files) >= 4 and not [p for p in files if secret in p.read_text()]


PASTED = {  # setting: the parameter that the sentence names
    "key_name=sk-open-sesame-0123456789": "key_name: expected the name of a variable",
    "base_url=https://vendor.org/v1?api_key=sk-open-sesame-0123456789": "base_url: more than an address stands in it",
    "base_url=https://me:sk-open-sesame-0123456789@vendor.org/v1": "base_url: a name or a password stands in it",
    "hard_model=sk-known-0123456789": "parameter hard_model: a key of this machine stands in it",
    "requests=[Write to sk-known-0123456789]": "parameter requests: a key of this machine stands in it",
}


@pytest.mark.parametrize("setting", PASTED)
def test_a_key_in_the_place_of_a_parameter_is_not_written(house, setting, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-known-0123456789")
    done = house.cli("run", "workshop", "--run", "a", "-p", setting)
    assert done.returncode == 2 and PASTED[setting] in done.stderr and "0123456789" not in done.stdout + done.stderr
    assert not house.run("a").exists()


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("size", [100_000, 1])
def test_no_space_left(tiny, size):
    """A limit on the size of a file stands for a full disk: a stage meets it while it writes, or the runner does."""
    tiny.stage(
        "3_end",
        "run_dir = 'x'  # folder\nrounds = 2  # how many",
        "from poetry_iter.core import write_text",
        f"write_text(f'{{run_dir}}/report.html', 'x' * {size})",
        f"print('y' * {60_000 // size})",
    )
    (tiny.path / "full.py").write_text(FULL.format(limit=50_000))
    script, tiny.script = tiny.script, tiny.path / "full.py"
    done = tiny.cli(str(script), "run", "tiny", "--run", "a", "-p", "rounds=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "ree some space" in done.stderr
    assert "1_start.ipynb" in tiny.notebooks("a") and "3_end.ipynb" not in tiny.notebooks("a")
    assert (not list(tiny.run("a").rglob("*.tmp")) and not (tiny.run("a") / "report.html").exists()) or size == 1
    tiny.script = script
    done = tiny.cli("run", "tiny", "--resume")  # with the space back
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError('I/O error: File too large (os error 27)')",
        "RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534')",
        "OSError(28, 'No space left on device')",
    ],
)
def test_no_space_left_as_libraries_tell_it(tiny, error):
    """safetensors and torch raise errors of their own in the kernel."""
    tiny.order("first: [3_end]")
    tiny.stage("3_end", "run_dir = 'x'  # folder\nrounds = 2  # how many", f"raise {error}")
    done = tiny.cli("run", "tiny", "--run", "a", "-p", "rounds=1")
    assert done.returncode == 2 and "cannot write in outputs/a: " in done.stderr.splitlines()[-1] and "go on with --resume" in done.stderr


def test_dev_full(tmp_path):
    """Standard output on a full device."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from poetry_iter.pipeline.command_line import main; sys.exit(main(['models']))"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HOUSE,
        )
    assert done.returncode == 2 and done.stderr == "poetry-iter: cannot write to standard output: No space left on device\n"
