"""The docs site: a small one is built and read as a browser would; the real one is checked as text."""

import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE / "docs"))

import build as site  # noqa: E402

from poetry_iter.core import UserError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
MODULE = '''"""Things about rain."""

# %% auto #0
__all__ = ['DROPS', 'Cloud', 'rain']

# %% ../nbs/lib/00_rain.ipynb #1
DROPS = 3

class Cloud:
    "A cloud."

    height: int = 2  # in km

    @property
    def wet(self) -> bool: return True

def rain(
    cloud: Cloud,  # where it falls from, as `<cloud>`
    *, hours: float = 1.5,  # how long | at most
) -> list[str]:  # the drops
    "Let it rain from a `Cloud`."

def _hidden(): "never seen"
'''


def project(folder: Path, link: str = "../critic/1_sun.ipynb") -> Path:
    "A house with two notebooks, a log and a module."
    notebooks = {
        "lib/00_rain.ipynb": [
            new_markdown_cell(f"# Rain\n\n> It falls.\n\nCall `rain()`, not `snow()`; then [the sun]({link}), [the data](../../data/drops.txt)."),
            new_code_cell("#| default_exp rain"),
            new_code_cell("#| export\nimport os"),
            new_code_cell("#| hide\nsecret = 1", outputs=[new_output("stream", name="stdout", text="never seen")]),
            new_code_cell(
                "#| export\ndef rain(): ...",
                outputs=[new_output("execute_result", data={"text/plain": "'a drop for $5 and $6'"})],
            ),
        ],
        "critic/1_sun.ipynb": [
            new_markdown_cell("# Sun\n\n> It shines."),
            new_code_cell("days = 3", metadata={"tags": ["parameters"]}),
        ],
        "critic/1_sun.failed.ipynb": [new_markdown_cell("# never seen")],
    }
    for name, cells in notebooks.items():
        (folder / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=cells), folder / "nbs" / name)
    (folder / "nbs/log.md").write_text("# Log\n\n## Rain fell\n")
    for name, text in {"data/drops.txt": "drip", "poetry_iter/rain.py": MODULE, "settings.ini": "[DEFAULT]\n"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    "A built site."
    folder = project(tmp_path_factory.mktemp("house"))
    return site.build(folder, folder / "docs/_build").parent


def read(html, name):
    return BeautifulSoup((html / name).read_text(), "html.parser")


def test_notebook_page(html):
    page = read(html, "lib/00_rain.html").article
    text = page.get_text()
    assert page.h1.get_text().startswith("Rain") and "It falls." in text
    assert "a drop for $5 and $6" in text and "def rain" in text
    for hidden in ("#|", "default_exp", "secret", "never seen"):
        assert hidden not in text
    links = {a.get_text(): a["href"] for a in page.find_all("a")}
    assert links["rain()"] == "../api/rain.html#poetry_iter.rain.rain" and "snow()" not in links
    assert links["the sun"] == "../critic/1_sun.html"
    assert (html / "lib" / links["the data"]).read_text() == "drip"
    assert page.select_one("details .cell_input").get_text().strip() == "import os", "imports are folded"
    assert read(html, "critic/1_sun.html").select_one(".tag_parameters")


def test_api_page(html):
    page = read(html, "api/rain.html").article
    ids = [tag["id"] for tag in page.select("dt[id]")]
    assert ids == [f"poetry_iter.rain.{name}" for name in ("DROPS", "Cloud", "Cloud.wet", "rain")]
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in page.select("table")[1].select("tbody tr")]
    assert rows == [
        ["cloud", "Cloud", "", "where it falls from, as <cloud>"],
        ["hours", "float", "1.5", "how long | at most"],
        ["returns", "list[str]", "", "the drops"],
    ]
    assert page.find("a", string="nbs/lib/00_rain.ipynb")["href"] == "../lib/00_rain.html"


def test_reading_order_and_search(html):
    tree = read(html, "index.html").select_one(".sidebar-tree")
    assert [c.get_text() for c in tree.select(".caption")] == ["Start", "Library", "Critic", "API"]
    assert [a.get_text() for a in tree.select("a")] == ["Log", "Rain", "Sun", "poetry_iter.rain"]
    assert '"shine"' in (html / "searchindex.js").read_text()  # a script, so that it loads from file://
    assert not list(html.rglob("*failed*"))


def test_broken_link_fails_the_build(tmp_path, capfd):
    with pytest.raises(UserError, match="the faults named above"):
        site.build(project(tmp_path, "../critic/2_moon.ipynb"), tmp_path / "out")
    assert "2_moon" in capfd.readouterr().err


def test_faults_are_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://example.org">fine</a><a href="#there" id="there">fine</a><div class="cell_output"><a href="r.html">fine</a></div><a href="b.html">gone</a><a href="#nowhere">gone</a>'
        '<script src="https://cdn.example.org/x.js"></script><img src="//cdn.example.org/x.png"><img src="data:image/png;base64,">'
    )
    (tmp_path / "a.css").write_text("body { background: url('https://cdn.example.org/x.woff') }")
    found = site.faults(tmp_path)
    assert len(found) == 5, found
    assert sum("cdn.example.org" in fault for fault in found) == 3


def test_every_notebook_begins_with_a_title_and_what_it_is():
    for path in (p for group in site.pages(HOUSE / "nbs").values() for p in group if p.suffix == ".ipynb"):
        first = next(c for c in nbformat.read(HOUSE / "nbs" / path, as_version=4).cells if c.cell_type == "markdown")
        lines = [line for line in first.source.split("\n") if line.strip()]
        assert lines[0].startswith("# "), f"nbs/{path} begins with no `# Title`"
        begins = "> " if path.parts[0] in ("lib", "explore") else ""
        assert lines[1:] and lines[1].startswith(begins), f"nbs/{path}: no `> summary` under its title"
