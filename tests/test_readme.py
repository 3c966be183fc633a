"""README.md is what nbs/index.ipynb says, and the command that makes it keeps all that a reader should see."""

import base64
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE / "docs"))

import readme  # noqa: E402

PNG = b"\x89PNG picture"


def test_readme_is_fresh():
    assert not readme.stale(HOUSE), "make readme"


def test_the_results_are_those_of_outputs_reference():
    from poetry_iter.reports import results_table

    text = (HOUSE / "README.md").read_text()
    shown = {cells[0]: cells[1:] for line in text.splitlines() if line.startswith("| more-") and " − " not in line for cells in [[c.strip() for c in line.strip("|").split("|")]]}
    table = results_table(HOUSE / "outputs/reference")
    assert shown == {run: [str(v) for v in row] for run, row in zip(table.index, table.values.tolist())}, "run nbs/index.ipynb again"


def test_runs_kept_as_tables_are_found_by_name():
    from poetry_iter.reports import paired_differences
    from poetry_iter.runs import find_run

    table = paired_differences([find_run("more-random-both"), find_run("outputs/reference/more-contrast-both")]).round(3)
    for row in table.itertuples():
        assert f"| {row.Index} | {row.round} | {row.mean:.3f} | {row.lo:.3f} | {row.hi:.3f} | {row.n} |" in (HOUSE / "README.md").read_text()


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project whose index has one cell of each kind."
    result = lambda **data: new_output("execute_result", data={k.replace("_", "/"): v for k, v in data.items()})
    frame = (
        '<div><style scoped>td {}</style><table class="dataframe"><thead><tr><th></th><th>arm</th><th>gain</th></tr></thead>'
        "<tbody><tr><th>0</th><td>top|k</td><td>0.21</td></tr></tbody></table><p>1 rows</p></div>"
    )
    cells = [
        new_markdown_cell("# A house\n\n> of poems\n\nSee [core](lib/00_core.ipynb#whole), [data](../data/README.md), [site](https://example.org)."),
        new_code_cell("#| hide\nsecret = 1", outputs=[new_output("stream", name="stdout", text="never seen")]),
        new_code_cell("#| echo: false\nhidden_source = 1", outputs=[result(text_plain="seen result")]),
        new_code_cell("#| eval: false\nshown = '```'", outputs=[new_output("stream", name="stderr", text="a warning")]),
        new_code_cell("table", outputs=[result(text_plain="arm gain", text_html=frame)]),
        new_code_cell(
            "plot",
            outputs=[new_output("display_data", data={"image/png": base64.b64encode(PNG).decode(), "text/plain": "<Figure>"})],
        ),
        new_code_cell("card", outputs=[result(text_html="<div><b>Rain</b></div><pre>one\n  two</pre>", text_plain="<HTML>")]),
    ]
    (tmp_path / "nbs/lib").mkdir(parents=True)
    (tmp_path / "nbs/lib/00_core.ipynb").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/README.md").write_text("poems")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs/index.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_reader_sees(project):
    assert readme.main([]) == 0
    text = (project / "README.md").read_text()
    assert "[core](nbs/lib/00_core.ipynb#whole), [data](data/README.md), [site](https://example.org)" in text
    assert "````python\nshown = '```'\n````" in text
    assert "```\nseen result\n```" in text
    assert "|  | arm | gain |\n| ---: | --- | ---: |\n| 0 | top\\|k | 0.21 |" in text
    assert "```\nRain\none\n  two\n```" in text
    assert "![](docs/images/index_5_0.png)" in text
    assert (project / "docs/images/index_5_0.png").read_bytes() == PNG
    for hidden in ("secret", "never seen", "hidden_source", "a warning", "#|", "<Figure>", "td {}"):
        assert hidden not in text


def test_check_tells_a_stale_readme(project, capsys):
    assert readme.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().err
    assert not (project / "README.md").exists(), "--check writes nothing"
    readme.main([])
    assert readme.main(["--check"]) == 0
    (project / "docs/images/index_9_0.png").write_bytes(PNG)  # of a cell that is gone
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == readme.main(["--check"]) == 0


def test_mistakes_are_named(project, capsys):
    (project / "data/README.md").unlink()
    assert readme.main([]) == 2
    assert "links to data/README.md" in capsys.readouterr().err
    nb = new_notebook(cells=[new_code_cell("1/0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="division by zero")])])
    nbformat.write(nb, project / "nbs/index.ipynb")
    assert readme.main([]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
