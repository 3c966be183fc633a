"""The docs site from the notebooks, their stored outputs and the package's source: `python docs/build.py`.

Reads nbs/**/*.ipynb, nbs/**/*.md and poetry_iter/*.py; runs no cell and imports no module of the package but the core.
Writes docs/_build/html. Fails on a broken link, a page without a title, or an asset from outside.
"""

import ast
import re
import sys
from pathlib import Path

import nbformat
from api import module
from bs4 import BeautifulSoup
from cells import directives, outside_code, relink, shown
from sphinx.cmd.build import build_main

from poetry_iter.core import UserError, root

ORDER = ["", "lib", "loop", "workshop", "critic", "verse", "embedded", "explore"]  # folders of nbs/ in reading order
CAPTIONS = {"": "Start", "lib": "Library", "embedded": "The embedded model"}
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
OUTSIDE = re.compile(r"^(https?:)?//")


def natural(path: Path) -> list:  # 2_x before 10_x
    "A sort key that reads numbers as numbers."
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix())]


def pages(
    nbs: Path,  # the notebooks' folder
) -> dict[str, list[Path]]:  # folder → its pages, relative to nbs
    "Notebooks and markdown files in reading order; what a run left behind and hidden files are left out."
    found = [p.relative_to(nbs) for p in nbs.rglob("*") if p.suffix in (".ipynb", ".md")]
    found = [p for p in found if not any(part.startswith((".", "_")) for part in p.parts) and len(p.suffixes) == 1]
    folders = {p.parts[0] if len(p.parts) > 1 else "" for p in found}
    order = [f for f in ORDER if f in folders] + sorted(folders - set(ORDER))
    first = lambda p: (p.name != "index.ipynb", natural(p))
    return {f: sorted((p for p in found if (p.parts[0] if len(p.parts) > 1 else "") == f), key=first) for f in order}


def name_links(
    text: str,  # of a markdown cell
    names: dict[str, str],  # name → where it is documented, as poetry_iter.core.root
) -> str:
    "`name` in running text becomes a link to its API entry."
    link = lambda m: f"{{py:obj}}`{m[1]}{m[2] or ''} <{names[m[1]]}>`" if m[1] in names else m[0]
    return outside_code(text, lambda part: re.sub(r"(?<![`\[}\w])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])", link, part))


def only_imports(source: str) -> bool:
    "Is this a cell of imports and nothing else?"
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)


def page(
    nb,  # a notebook
    folder: Path,  # where it lies
    target,  # see `relink`
    names: dict[str, str],  # see `name_links`
):  # the notebook that Sphinx reads
    "A notebook as a reader sees it: no directives, no hidden cells, links that work in the site."
    cells, made = [], None
    for cell in nb.cells:
        if cell.cell_type == "raw":
            continue
        if cell.cell_type == "markdown":
            cell.source = name_links(relink(cell.source, folder, target), names)
            cells.append(cell)
            continue
        flags = directives(cell.source)
        made = next((f.split()[1] for f in flags if f.startswith("default_exp ")), made)
        source, outputs = shown(cell)
        if not source.strip() and not outputs:
            continue
        tags = [t for t in ("parameters", "export") if t in flags or t in cell.metadata.get("tags", [])]
        tags += ["remove-input"] if not source.strip() else ["hide-input"] if only_imports(source) else []
        outputs = [o for o in outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        for output in outputs:
            if "data" in output:
                output.data.pop("text/latex", None)
        cells.append(nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": tags}))
    if made and f"poetry_iter.{made}" in names:
        cells.insert(1, nbformat.v4.new_markdown_cell(f"Module {{py:mod}}`poetry_iter.{made}`"))
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def toctree(caption: str, documents: list[str]) -> str:
    "A group of the site's table of contents."
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *documents, "```"])


def write_source(
    project: Path,  # its root
    out: Path,  # a folder; what is not written anew is removed
) -> int:  # pages written
    "What Sphinx reads: notebooks as they are shown, API pages, the table of contents."
    files: dict[Path, str | Path] = {}  # path in out → text, or a file to copy
    nbs, groups = project / "nbs", pages(project / "nbs")

    modules = sorted(p for p in (project / "poetry_iter").rglob("*.py") if not p.name.startswith("_"))
    api = {f"poetry_iter.{p.stem}": module(p, f"poetry_iter.{p.stem}") for p in modules}
    where: dict[str, list[str]] = {}
    for mod, (_, exported) in api.items():
        for name in exported:
            where.setdefault(name, []).append(f"{mod}.{name}")
    full = {name: name for mod, (_, exported) in api.items() for name in [mod, *(f"{mod}.{n}" for n in exported)]}
    single = {name: found[0] for name, found in where.items() if len(found) == 1}
    near = lambda mod: {**full, **single, **{n: f"{mod}.{n}" for n in api.get(mod, ([], []))[1]}}
    for mod, (lines, _) in api.items():
        files[Path("api") / f"{mod.partition('.')[2]}.md"] = name_links("\n".join(lines), near(mod)) + "\n"

    def target(depth):
        "Links out of nbs/: a folder is shown as its path, a file becomes a download beside the pages."

        def new(path):
            if path.is_relative_to(nbs) and path.suffix in (".ipynb", ".md"):
                return None
            if not path.is_file():
                return None
            copy = Path("files") / path.relative_to(project)
            copy = copy.with_name(copy.name + ".txt") if copy.suffix in (".md", ".ipynb", ".rst") else copy
            files[copy] = path
            return "../" * depth + copy.as_posix()

        return new

    for path in (p for group in groups.values() for p in group):
        links = target(len(path.parts) - 1)
        if path.suffix == ".md":
            files[path] = name_links(relink((nbs / path).read_text(encoding="utf-8"), (nbs / path).parent, links), near(""))
            continue
        nb = nbformat.read(nbs / path, as_version=4)
        made = next(
            (f.split()[1] for c in nb.cells if c.cell_type == "code" for f in directives(c.source) if f.startswith("default_exp ")),
            "",
        )
        files[path] = nbformat.writes(page(nb, (nbs / path).parent, links, near(f"poetry_iter.{made}")))

    documents = {f: [p.with_suffix("").as_posix() for p in group] for f, group in groups.items()}
    trees = [toctree(CAPTIONS.get(f, f.capitalize()), [d for d in group if d != "index"]) for f, group in documents.items()]
    trees.append(toctree("API", [f"api/{mod.partition('.')[2]}" for mod in api]))
    home = Path("index.ipynb")
    if home in files:
        nb = nbformat.reads(files[home], as_version=4)
        nb.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(trees)))
        files[home] = nbformat.writes(nb)
    else:
        files[Path("index.md")] = "\n\n".join(["# Notebooks", *trees]) + "\n"

    for old in [p for p in out.rglob("*") if p.is_file() and p.relative_to(out) not in files]:
        old.unlink()
    for path, body in files.items():
        body = body.read_bytes() if isinstance(body, Path) else body.encode()
        if not (out / path).is_file() or (out / path).read_bytes() != body:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(body)
    return sum(map(len, groups.values())) + len(api)


def faults(
    html: Path,  # a built site
) -> list[str]:  # a sentence each
    "What keeps a site from being read offline: assets from outside, links to files and places that are not there."
    found, soups = (
        [],
        {p: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in sorted(html.rglob("*.html"))},
    )
    ids = {p: {tag["id"] for tag in soup.find_all(id=True)} for p, soup in soups.items()}
    for path, soup in soups.items():
        page = path.relative_to(html).as_posix()
        for tag in soup.find_all(["script", "link", "img", "iframe", "source", "video", "audio", "a"]):
            link = tag.get("href") or tag.get("src") or ""
            if not link or link.startswith(("data:", "mailto:")):
                continue
            if tag.name == "a" and tag.find_parent(class_="cell_output"):
                continue  # a link to what lay beside the run
            if OUTSIDE.match(link):
                if tag.name != "a" and tag.get("rel") != ["canonical"]:
                    found.append(f"{page}: <{tag.name}> from outside: {link}")
                continue
            name, _, anchor = link.partition("#")
            name = name.partition("?")[0]
            goal = (path.parent / name).resolve() if name else path
            if not goal.exists():
                found.append(f"{page}: <{tag.name}> leads to {link}, which is not there")
            elif anchor and goal in ids and anchor not in ids[goal]:
                found.append(f"{page}: no place #{anchor} in {goal.name}")
    for css in html.rglob("*.css"):
        found += [
            f"{css.relative_to(html)}: {m[0]}" for m in re.finditer(r"(url\(|@import)\s*[\"']?https?://[^)\s]*", css.read_text(encoding="utf-8"))
        ]
    return found


def build(project: Path, out: Path) -> Path:  # the site's first page
    "Build the site under `out`; raises `UserError` when it has faults."
    n = write_source(project, out / "src")
    settings = Path(__file__).resolve().parent
    args = ["-q", "-W", "--keep-going", "-c", settings, "-d", out / "doctrees", "-b", "html", out / "src", out / "html"]
    if build_main([str(a) for a in args]):
        raise UserError("the site has the faults named above")
    if found := faults((out / "html").resolve()):
        raise UserError("\n".join(["the site has faults:", *found]))
    print(f"{n} pages", file=sys.stderr)
    return out / "html" / "index.html"


if __name__ == "__main__":
    try:
        print(build(root(), root() / "docs/_build"))
    except UserError as e:
        sys.exit(str(e))
