"""The docs site: a small one is built with the real settings and read as a browser would; the real pages are checked as text."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HOUSE = Path(__file__).resolve().parent.parent
MODULE = '''"""Things about rain."""

# %% auto #0
__all__ = ['DROPS', 'Cloud', 'rain']

# %% ../../nbs/lib/verse/01_rain.ipynb #1
DROPS = 3  # a minute

class Cloud:
    "A cloud."
    height: int = 2  # in km
    @property
    def wet(self) -> bool: return True

def rain(
    cloud: Cloud,  # where it falls from, as `<cloud>`
    *, hours: float = 1.5,  # how long | at most
) -> list[str]:  # the drops
    "Let it rain from a `Cloud`, *slowly*."

def _hidden(): "never seen"
'''


def build(folder: Path, link: str = "../../workshop/1_sun.ipynb"):  # the finished process and the folder of pages
    "A site of two notebooks, a log and a module in a room."
    says = lambda text: new_output("execute_result", data={"text/plain": text})
    notebooks = {
        "index": [new_markdown_cell("# House\n\nSee [the log](log.md).")],
        "lib/verse/01_rain": [
            new_markdown_cell(f"# Rain\n\n> It falls.\n\nCall `rain()`, not `snow()`, on a day of `rain`; then [the sun]({link}), [the data](../../../data/drops.txt)."),
            new_code_cell("#| default_exp verse.rain"),
            new_code_cell("#| export\nimport os"),
            new_code_cell("#| hide\nsecret = 1", outputs=[says("never seen")]),
            new_code_cell("#| export\ndef rain(): ...", outputs=[says("'a drop for $5 and $6'")]),
        ],
        "workshop/1_sun": [new_markdown_cell("# Sun\n\n> It shines."), new_code_cell("days = 3", metadata={"tags": ["parameters"]})],
        "workshop/1_sun.failed": [new_markdown_cell("# never seen")],
    }
    files = {f"nbs/{name}.ipynb": nbformat.writes(new_notebook(cells=cells)) for name, cells in notebooks.items()}
    files |= {"nbs/log.md": "# Log\n\n## Rain fell\nA day of `rain`, under a `Cloud`.\n", "data/drops.txt": "drip", "poetry_iter/__init__.py": "", "poetry_iter/verse/rain.py": MODULE}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", HOUSE / "docs", folder, folder / "html"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}), folder / "html"


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    done, html = build(tmp_path_factory.mktemp("house"))
    assert done.returncode == 0, done.stderr
    return lambda name: BeautifulSoup((html / name).read_text(), "html.parser")


def test_notebook_page(read):
    page = read("nbs/lib/verse/01_rain.html").article
    text = page.get_text()
    assert page.h1.get_text().startswith("Rain") and "It falls." in text
    assert "a drop for $5 and $6" in text and "def rain" in text
    assert not [hidden for hidden in ("#|", "default_exp", "secret", "never seen") if hidden in text]
    links = {a.get_text(): a["href"] for a in page.find_all("a")}
    assert links["rain()"] == "../../../docs/api/poetry_iter.verse.rain.html#poetry_iter.verse.rain.rain" and "snow()" not in links and "rain" in links
    assert links["the sun"] == "../../workshop/1_sun.html" and links["the data"].endswith("drops.txt")
    assert page.select_one("details .cell_input").get_text().strip() == "import os", "imports are folded"
    assert read("nbs/workshop/1_sun.html").select_one(".tag_parameters")
    assert [a.get_text() for a in read("nbs/log.html").article.find_all("a", class_="reference")] == ["Cloud"], "a plain word is a word where nobody imports it"


def test_api_page(read):
    page = read("docs/api/poetry_iter.verse.rain.html").article
    assert {tag["id"].removeprefix("poetry_iter.verse.rain.") for tag in page.select("dt[id]")} == {"DROPS", "Cloud", "Cloud.wet", "rain"}
    text = " ".join(page.get_text().split())
    for said in (
        "Let it rain from a Cloud, *slowly*.",
        "cloud – where it falls from, as <cloud>",
        "hours – how long | at most",
        "the drops",
        "height – in km",
        "a minute",
    ):
        assert said in text, said
    assert page.find("a", string="Rain")["href"] == "../../nbs/lib/verse/01_rain.html"


def test_outline_and_search(read):
    tree = read("nbs/index.html").select_one(".sidebar-tree")
    assert [c.get_text() for c in tree.select(".caption")] == ["Start", "Verse", "Teacher and workshop", "Log"], (
        "rooms that are not there are left out"
    )
    assert [a.get_text() for a in tree.select("a")] == ["House", "Rain", "poetry_iter.verse.rain", "Sun", "Log"]
    assert '"shine"' in str(read("searchindex.js"))  # a script, so that it loads from file://


def test_broken_links_and_outside_assets_fail_the_build(tmp_path):
    done, _ = build(tmp_path, "../../workshop/2_moon.ipynb), ![](https://example.org/moon.png")
    assert done.returncode
    assert "xref_missing" in done.stderr and "2_moon" in done.stderr
    assert "01_rain.html loads from outside" in done.stderr and "moon.png" in done.stderr


def test_every_notebook_begins_with_a_title_and_what_it_is():
    for path in [p.relative_to(HOUSE / "nbs") for p in (HOUSE / "nbs").rglob("[!._]*.ipynb") if ".ipynb_checkpoints" not in p.parts]:
        first = next(c for c in nbformat.read(HOUSE / "nbs" / path, as_version=4).cells if c.cell_type == "markdown")
        title, summary = [line for line in first.source.split("\n") if line.strip()][:2]
        assert title.startswith("# "), f"nbs/{path} begins with no `# Title`"
        assert summary.startswith("> ") or path.parts[0] not in ("lib", "explore"), f"nbs/{path}: no `> summary` under its title"
