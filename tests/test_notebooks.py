"""Notebooks as text: what a stage and a module notebook must look like, so that they can be read, run and changed by anybody."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from poetry_iter.pipeline.experiments import (
    check_parameters,
    declared_parameters,
    find_experiments,
    get_experiment,
    load_stages,
    read_profile,
    read_stage,
)
from poetry_iter.pipeline.parameters import GIVEN, Choices, Range, names_in, resolve
from poetry_iter.pipeline.plans import reckon

HOUSE = Path(__file__).resolve().parents[1]
NBS = HOUSE / "nbs"
EXPERIMENT_FOLDERS = sorted(p.parent for p in NBS.glob("*/experiment.yaml"))
STAGES = [p for folder in EXPERIMENT_FOLDERS for p in sorted(folder.glob("[0-9]*.ipynb"))]
MODULES = sorted((NBS / "lib").rglob("[0-9]*.ipynb"))
PROFILES = [p for folder in EXPERIMENT_FOLDERS for p in sorted((folder / "profiles").glob("*.yaml"))]


def name(path: Path) -> str:
    return str(path.relative_to(NBS))


def cells(path: Path, kind: str = "code") -> list:
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def tree(source: str) -> ast.Module:
    """The code of a cell, without its directives, magics and shell lines."""
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n")))


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def mixed(source: str) -> bool:
    """Whether a cell holds imports and other code side by side."""
    kinds = {is_import(node) for node in tree(source).body}
    return kinds == {True, False}


def defined(source: str) -> list[str]:
    return [n.name for n in ast.walk(tree(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


def uncommented(source: str) -> list[str]:
    """Lines of a parameters cell that are no literal with a comment behind it."""
    return [line for line in source.split("\n") if line.strip() and not re.fullmatch(r"\w+ = .+?  # \S.*", line)]


def names_read(path: Path) -> set[str]:
    """Every name that the code of a stage reads, its parameters cell apart."""
    code = [c.source for c in cells(path) if "parameters" not in c.metadata.get("tags", [])]
    return {n.id for source in code for n in ast.walk(tree(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stage_faults(path: Path) -> list[str]:
    """What is wrong with a stage notebook."""
    code, text = cells(path), "\n".join(c.source for c in cells(path, "markdown"))
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    faults = [f"no line that begins with **{word}**" for word in ("Reads", "Writes") if not re.search(rf"^\*\*{word}\*\*", text, re.M)]
    if not cells(path, "markdown")[:1] or not cells(path, "markdown")[0].source.startswith("# "):
        faults.append("no title")
    if len(tagged) != 1:
        return [*faults, f"{len(tagged)} cells with the tag parameters"]
    faults += [f"parameter without a comment, or not one a line: {line!r}" for line in uncommented(tagged[0].source)]
    declared = read_stage(path).parameters
    faults += [f"parameter {p} is never read" for p in declared if p not in names_read(path)]
    if "run_dir" not in declared:
        faults.append("run_dir is not a parameter")
    before = [c for c in code[: code.index(tagged[0])] if not all(map(is_import, tree(c.source).body))]
    faults += [f"code before the parameters: {c.source.splitlines()[0]!r}" for c in before]
    faults += [f"defines {d}: it belongs into nbs/lib" for c in code for d in defined(c.source)]
    faults += [f"imports and code in one cell: {c.source.splitlines()[0]!r}" for c in code if mixed(c.source)]
    if not any(isinstance(n, ast.Assert) for c in code for n in ast.walk(tree(c.source))):
        faults.append("asserts nothing about what it wrote")
    return faults


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_a_stage(path):
    assert stage_faults(path) == []


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module(path):
    code = cells(path)
    assert sum("#| default_exp" in c.source for c in code) == 1
    first = nbformat.read(path, 4).cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .+\n+> \S", first.source), "title and a one-line summary come first"
    assert [c.source.splitlines()[0] for c in code if mixed(c.source)] == [], "imports and code in one cell"


def test_the_checks_find_faults(tmp_path):
    sources = ["import os\nx = 1", "run_dir = 'x'  # folder\nn = 2\nunused = 1  # nothing", "def f(): return run_dir, n"]
    made = [nbformat.v4.new_code_cell(s) for s in sources]
    made[1].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Bad\n\n**Reads** all"), *made]), tmp_path / "bad.ipynb")
    assert stage_faults(tmp_path / "bad.ipynb") == [
        "no line that begins with **Writes**",
        "parameter without a comment, or not one a line: 'n = 2'",
        "parameter unused is never read",
        "code before the parameters: 'import os'",
        "defines f: it belongs into nbs/lib",
        "imports and code in one cell: 'import os'",
        "asserts nothing about what it wrote",
    ]


@pytest.mark.parametrize("folder", EXPERIMENT_FOLDERS, ids=name)
def test_the_stages_of_an_experiment_agree(folder):
    experiment = get_experiment(folder.name)
    assert experiment.question.endswith("?") and find_experiments()[folder.name] == folder
    assert set(experiment.stages) == {p.stem for p in folder.glob("*.ipynb")}
    stages = load_stages(experiment)
    everything = declared_parameters(stages)  # raises where two stages declare one name with another default or domain
    values = {k: p.default for k, p in everything.items()}
    check_parameters(values, everything, experiment)
    for k, p in everything.items():
        if isinstance(p.domain, Choices):
            assert len(p.domain.all()) > 1
        if isinstance(p.domain, Range) and isinstance(p.domain.high, str):
            assert p.domain.high in everything, f"{k}: {p.domain} names no parameter"
    needed = {name for rule in experiment.rules.values() for name in names_in(rule["holds"])} | names_in(experiment.rounds) | {n for said in experiment.skips for n in names_in(said)}
    assert needed <= everything.keys()
    assert {s for left_out in experiment.skips.values() for s in left_out} <= set(experiment.stages)
    assert set(reckon(experiment, values)) <= set(experiment.stages)
    for each in experiment.each:
        assert "round" in stages[each].parameters


@pytest.mark.parametrize("path", PROFILES, ids=name)
def test_a_profile(path):
    experiment = get_experiment(path.parents[1].name)
    declared, found = declared_parameters(load_stages(experiment)), read_profile(path.stem, experiment)
    assert found == yaml.safe_load(path.read_text()) and not found.keys() & set(GIVEN), "the runner gives those"
    values = resolve(declared, found)  # raises for a name that no stage declares, and for a wrong type
    check_parameters({k: v for k, v in values.items() if k not in ("poems", "engine", "load_in_4bit")}, declared, experiment)


def test_the_tag_survives_nbdev_clean(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text((HOUSE / "settings.ini").read_text())
    copies = [tmp_path / "nbs" / f"{i}.ipynb" for i in range(len(STAGES))]
    for path, copy in zip(STAGES, copies):
        nb = json.loads(path.read_text())
        nb["cells"][0]["metadata"]["a_key_to_be_cleaned"] = True  # what it does clean
        copy.write_text(json.dumps(nb))
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=tmp_path, check=True)
    for path, copy in zip(STAGES, copies):
        assert "a_key_to_be_cleaned" not in copy.read_text()
        assert read_stage(copy).parameters == read_stage(path).parameters


def test_no_absolute_path_of_a_machine():
    for path in [*STAGES, *MODULES]:
        assert not re.search(r"/(home|Users|work)/\w+/", path.read_text()), f"{name(path)} names a folder of one machine"


def test_no_progress_bar_in_a_stored_output():
    """Bars and warnings go to stderr: they say nothing to a reader, and differ with each run."""
    for path in sorted(NBS.rglob("*.ipynb")):
        if "checkpoints" in str(path):
            continue
        kinds = {o.get("name") for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])}
        assert "stderr" not in kinds, f"{name(path)} keeps what was written to stderr"


def exported_names() -> dict[str, list[str]]:
    "Public name → the modules that export it."
    found: dict[str, list[str]] = {}
    for path in sorted((HOUSE / "poetry_iter").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    found.setdefault(name, []).append(str(path.relative_to(HOUSE / "poetry_iter")))
    return found


def test_no_public_name_is_exported_twice():
    found = exported_names()
    assert len(found) > 200  # the rooms are read too
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


def test_numbers_give_one_reading_order():
    "Two notebooks of a room with one number have no order."
    for folder in {p.parent for p in MODULES}:
        numbers = [p.name.split("_")[0] for p in sorted(folder.glob("[0-9]*.ipynb"))]
        assert len(numbers) == len(set(numbers)), folder


def test_each_module_has_one_notebook():
    made = [re.search(r"#\| default_exp (\S+)", "\n".join(c.source for c in cells(path)))[1] for path in MODULES]
    assert sorted({m for m in made if made.count(m) > 1}) == []
    modules = [
        p.relative_to(HOUSE / "poetry_iter").with_suffix("").as_posix().replace("/", ".")
        for p in (HOUSE / "poetry_iter").rglob("*.py")
        if not p.name.startswith("_")
    ]
    assert sorted(made) == sorted(modules)


def room(module: str) -> str:
    return module.rpartition(".")[0].split(".")[0]


ARROWS = {"core": set(), "poems": {"core"}, "verse": {"core"}, "engines": {"core", "poems", "renderers", "engine"}}  # who may import whom


def arrows() -> list[str]:
    "Imports that point the wrong way."
    faults = []
    for path in (HOUSE / "poetry_iter").rglob("*.py"):
        parts = path.relative_to(HOUSE / "poetry_iter").with_suffix("").parts
        own = parts[0]
        if own not in ARROWS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = list(parts[: len(parts) - node.level]) if node.level else []
                full = (
                    [*base, *(node.module or "").split(".")]
                    if node.level
                    else (node.module or "").split(".")[1:]
                    if (node.module or "").startswith("poetry_iter")
                    else None
                )
                for target in [] if full is None else [p for p in full if p][:1] or [a.name for a in node.names]:
                    if target != own and target not in ARROWS[own]:
                        faults.append(f"{'/'.join(parts)} imports {target}")
    return faults


def test_arrows_point_one_way():
    assert arrows() == []


# ------------------------------------------------------------------ one seam to the engines

BEHIND = {"torch", "peft", "transformers", "trl", "accelerate", "bitsandbytes", "unsloth", "llama_cpp", "gguf", "ray", "tinker"}  # packages
INSIDE = {"lm", "get_base_model", "peft_config", "get_output_embeddings", "from_pretrained", "load_adapter"}  # attributes of what they give
FILES = ("adapter_model.safetensors", "adapter_config.json", "made_with.json")
MAKES_MODELS = {"embedded/pretraining.py", "critic/reinforcement.py"}  # a model made from nothing, with torch; an experiment with TRL's own trainer


def leaks(source: str) -> list[str]:
    "What in a module reaches behind the seam."
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        found += [f"line {node.lineno} imports {m}" for m in modules if m.split(".")[0] in BEHIND]
        if isinstance(node, ast.Attribute) and node.attr in INSIDE:
            found.append(f"line {node.lineno} reads .{node.attr}")
        if isinstance(node, ast.Constant) and node.value in FILES:
            found.append(f"line {node.lineno} knows {node.value}")
    return found


def behind_the_seam(path: Path) -> bool:
    name = path.relative_to(HOUSE / "poetry_iter").as_posix()
    return name.startswith("engines/") or name in MAKES_MODELS or path.name.startswith("_")


def test_nobody_reaches_behind_the_seam():
    modules = [p for p in sorted((HOUSE / "poetry_iter").rglob("*.py")) if not behind_the_seam(p)]
    assert len(modules) > 30
    assert {p.name: found for p in modules if (found := leaks(p.read_text()))} == {}
    stages = {
        name(p): [x for c in cells(p) for x in leaks("\n".join(line for line in c.source.split("\n") if not line.startswith("%")))]
        for p in STAGES
        if p.parent.name != "embedded"
    }
    assert {k: v for k, v in stages.items() if v} == {}


def test_the_seam_is_guarded():
    "The guard finds a fault that is planted in a room."
    planted = 'import torch.nn as nn\nfrom peft import PeftModel\nx = model.lm\npath = folder / "adapter_model.safetensors"\n'
    assert [f.split(" ", 2)[2] for f in leaks(planted)] == ["imports torch.nn", "imports peft", "reads .lm", "knows adapter_model.safetensors"]
    assert leaks("from poetry_iter.engine import open_engine\nlm = open_engine()") == []
