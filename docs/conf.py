"""The docs site: Sphinx reads the notebooks with their stored outputs, and the package for its API pages (`make docs`).

The hooks below show a notebook as nbdev means it, turn the comments beside parameters into lists, and link names.
"""

import ast
import contextlib
import enum
import functools
import inspect
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from docutils import nodes
from fastcore.docments import docments
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from cells import directives, shown  # noqa: E402

house = ConfigParser(delimiters=["="], interpolation=None)
house.read(HERE.parent / "settings.ini", encoding="utf-8")
project, version, copyright = (house["DEFAULT"][key] for key in ("title", "version", "copyright"))
html_title, language = f"{project} {version}", "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = "nbs/index"
include_patterns = ["nbs/**", "docs/api/*.rst", "docs/start/*.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["**/.*", "**/_*", "**/*.*.ipynb", ".*", "outputs", "docs/_build", "build", "tests", "bench"]
# docutils' warnings are about markup inside of outputs, as a rule in a poem
suppress_warnings = ["docutils", "misc.highlighting_failure", "myst.header", "mystnb.unknown_mime_type", "mystnb.mime_priority"]

html_theme, html_static_path, html_css_files = "furo", ["static"], ["site.css"]
html_extra_path = ["index.html"]  # leads on to nbs/index.html
html_copy_source = False
html_show_search_summary = False  # would be fetched, which a browser refuses on file://
html_theme_options = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "default", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

nb_execution_mode = "off"  # stored outputs are shown; nothing runs here
nb_output_stderr = "remove"
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = "imports"  # the only cells that are folded
nb_ipywidgets_js = {}  # would come from a CDN
myst_enable_extensions = ["strikethrough"]  # no dollarmath: a dollar is a dollar
myst_heading_anchors = 4

add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88

IMPORTS = re.compile(r"((import|from) \S[^\n(]*(\([^)]*\))?\s*|\s*#[^\n]*\n)+")  # a cell of imports and nothing else


def read_notebook(app, docname: str, text: list[str]) -> None:
    "A notebook as a reader sees it: no directives, no hidden cells, its API page below it; the outline below the first page."
    if app.env.doc2path(docname).suffix != ".ipynb":
        return
    cells, module = [], None
    for cell in nbformat.reads(text[0], as_version=4).cells:
        if cell.cell_type == "markdown":
            cells.append(cell)
        elif cell.cell_type == "code":
            flags, (source, outputs) = directives(cell.source), shown(cell)
            module = next((flag.split()[1] for flag in flags if flag.startswith("default_exp ")), module)
            outputs = [o for o in outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
            for output in outputs:
                output.get("data", {}).pop("text/latex", None)
            tags = [tag for tag in ("parameters", "export") if tag in flags or tag in cell.metadata.get("tags", [])]
            tags += ["remove-input"] if not source.strip() else ["hide-input"] if IMPORTS.fullmatch(source) else []
            if source.strip() or outputs:
                cells.append(nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": tags}))
    if module:
        tree = f"```{{toctree}}\n:hidden:\n\n/docs/api/poetry_iter.{module}\n```"
        cells.insert(1, nbformat.v4.new_markdown_cell(f"Module [poetry_iter.{module}](/docs/api/poetry_iter.{module}.rst)\n\n{tree}"))
    if docname == root_doc:
        lines = (HERE / "outline.md").read_text(encoding="utf-8").splitlines()
        there = [line for line in lines if not line.startswith("/") or any(Path(app.srcdir).glob(f"{line[1:]}.*"))]
        cells.append(nbformat.v4.new_markdown_cell("\n".join(there)))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    text[0] = nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel))


def write_stubs(app) -> None:
    "A page for autodoc a module: functions and classes by their docstrings, constants by the comments beside them."
    out, known = Path(app.srcdir) / "docs/api", set()
    out.mkdir(parents=True, exist_ok=True)
    for path in (Path(app.srcdir) / "poetry_iter").rglob("[!_]*.py"):
        source, name = path.read_text(encoding="utf-8"), ".".join(path.relative_to(app.srcdir).with_suffix("").parts)
        made = ", ".join(f":doc:`{n}`" for n in dict.fromkeys(re.findall(r"^# %% [./]+(/nbs/\S+)\.ipynb", source, re.M)))
        page = f"{name}\n{'=' * len(name)}\n\nExplained and tested in {made}.\n\n.. automodule:: {name}\n   :members:\n   :undoc-members:\n"
        tree, lines = ast.parse(source).body, source.splitlines()
        exported = next((ast.literal_eval(n.value) for n in tree if ast.unparse(n).startswith("__all__ =")), [])
        for node in (n for n in tree if isinstance(n, ast.Assign | ast.AnnAssign) and "namedtuple(" not in lines[n.lineno - 1]):
            for target in {ast.unparse(t) for t in getattr(node, "targets", [getattr(node, "target", None)])} & {*exported}:
                long = "   :no-value:\n" if len(ast.unparse(node)) > 100 else ""
                page += f"\n.. autodata:: {name}.{target}\n{long}\n   {plain(lines[node.end_lineno - 1].partition('  # ')[2])}\n"
        known.add(file := out / f"{name}.rst")
        if not file.is_file() or file.read_text(encoding="utf-8") != page:
            file.write_text(page, encoding="utf-8")
    for old in {*out.glob("*.rst")} - known:
        old.unlink()


def plain(text: str) -> str:  # reStructuredText that shows the text as it is
    "Only code between backticks is markup."
    return "".join(f"`{part}`" if i % 2 else re.sub(r"([*_|\\<`])", r"\\\1", part) for i, part in enumerate(re.split(r"(`[^`]+`)", text)))


def add_docments(app, what, name, obj, options, lines) -> None:
    "What is said beside parameters, fields and the returned value, as a list below the docstring."
    if what == "class" and lines and lines[0].startswith(f"{obj.__name__}("):
        lines.clear()  # a dataclass without a docstring gets its signature for one
    lines[:] = [line if line.startswith("  ") else plain(line) for line in lines]
    said = {}
    with contextlib.suppress(OSError, TypeError):  # no source, as a namedtuple
        said = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(obj), re.M)) if what == "class" else {}
        said |= {key: note for key, note in docments(obj, args_kwargs=True).items() if note}
    returned = said.pop("return", None)
    found = [f":param {key}: {plain(note)}".replace("\n", " ") for key, note in said.items()]
    lines += ["", *found, *([f":returns: {plain(returned)}".replace("\n", " ")] if returned and what != "class" else []), ""]


def skip_member(app, what, name, obj, skip, options) -> bool | None:
    "Of a class: what is documented, properties, and the members of an enum."
    kept = isinstance(obj, property | functools.cached_property | enum.Enum) or (inspect.isroutine(obj) and inspect.getdoc(obj))
    return None if what != "class" or name.startswith("_") else not kept


def meant(said: str, code: str) -> bool:
    "Whether a name in running text is ours: a plain word, as `worst` or `poem`, only where the page imports or defines it."
    return not (said.isalpha() and said.islower()) or bool(re.search(rf"\b(?:import|def) (?:.*\W)?{said}\b", code))


class LinkNames(SphinxPostTransform):
    "`name` in running text leads to its entry on an API page."

    default_priority = 5

    def run(self) -> None:
        objects = self.env.domains["py"].objects
        names = {name: entry for name, entry in objects.items() if entry.objtype != "module"}
        names |= {name.rpartition(".")[2]: entry for name, entry in names.items() if entry.objtype in ("function", "class", "data", "exception")}
        code = "\n".join(block.astext() for block in self.document.findall(nodes.literal_block))
        for node in list(self.document.findall(nodes.literal)):
            said = node.astext()
            entry = names.get(said.removesuffix("()"))
            if entry and not isinstance(node.parent, nodes.reference) and (meant(said, code) or entry.docname == self.env.docname):
                node.replace_self(make_refnode(self.app.builder, self.env.docname, entry.docname, entry.node_id, node.deepcopy()))


def check_offline(app, error) -> None:
    "No page may fetch anything from outside, so that the site reads the same from a folder."
    found = re.compile(r"<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)=[\"'](?:https?:)?//[^\"']*|url\([\"']?https?://[^)]*")
    for path in Path(app.outdir).rglob("*") if not error else ():
        if path.suffix in (".html", ".css") and (match := found.search(path.read_text(encoding="utf-8"))):
            raise ExtensionError(f"{path.relative_to(app.outdir)} loads from outside: {match[0]}")


def setup(app) -> None:
    app.connect("builder-inited", write_stubs)
    app.connect("source-read", read_notebook)
    app.connect("autodoc-process-docstring", add_docments)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("build-finished", check_offline)
    app.add_post_transform(LinkNames)
