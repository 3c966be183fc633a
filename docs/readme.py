"""README.md and its pictures (docs/images) from nbs/index.ipynb: `make readme`; with --check nothing is written, and exit status 1 says that they are stale."""

import base64
import os
import re
import sys
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from cells import shown

from poetry_iter.core import UserError, root, write_bytes

NOTICE = "<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->"
BLOCKS = ["p", "div", "br", "tr", "li", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "table", "details", "summary"]


def fenced(text: str, language: str = "") -> str:
    "A fenced block, its fence longer than any in the text."
    fence = "`" * (max(map(len, re.findall(r"`{3,}", text)), default=2) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(html) -> str:  # of a parsed <table>
    "A markdown table; rows of a head with several levels are joined."
    rows = [cells for row in html.find_all("tr") if (cells := [c.get_text(" ", strip=True).replace("|", "\\|") for c in row.find_all(["td", "th"])])]
    n_head, width = len(html.thead.find_all("tr")) if html.thead else 1, max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    head = [" ".join(filter(None, column)) for column in zip(*rows[:n_head], strict=True)]
    right = [all(re.fullmatch(r"[-+−–.,\d%e ]*", row[i]) for row in rows[n_head:]) for i in range(width)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---:" if r else "---" for r in right], *rows[n_head:]])


def from_html(html: str) -> str:
    "Tables as markdown tables, anything else as the text it shows."
    soup, tables = BeautifulSoup(html, "html.parser"), []
    for tag in soup(["style", "script"]):
        tag.decompose()
    for tag in soup.find_all("table"):
        tables.append(table(tag))
        tag.replace_with("\0")
    for tag in soup.find_all(BLOCKS):
        tag.append("\n")
        if tag.previous_sibling is not None and tag.previous_sibling.name not in BLOCKS:
            tag.insert_before("\n")
    texts = [re.sub(r"\n\s*\n\s*\n+", "\n\n", text).strip("\n") for text in soup.get_text().split("\0")]
    return "\n\n".join(part for text, t in zip(texts, [*tables, ""], strict=True) for part in (fenced(text) if text.strip() else "", t) if part)


def from_output(
    output,  # of a code cell
    picture: str,  # path of a picture, without suffix
    files: dict[str, bytes],  # pictures are added here
) -> str:  # empty when it says nothing
    "An output of a cell as markdown."
    if output.output_type == "error":
        raise UserError(f"nbs/index.ipynb: a cell ended in {output.ename}: {output.evalue}; run the notebook again")
    if output.output_type == "stream":
        return fenced(output.text) if output.name == "stdout" and output.text.strip() else ""
    data = output.data
    if mime := next((m for m in ("image/png", "image/svg+xml") if m in data), None):
        path = f"{picture}.{mime[6:9]}"
        files[path] = data[mime].encode() if mime.endswith("xml") else base64.b64decode(data[mime])
        return f"![]({path})"
    if "text/html" in data and "text/markdown" not in data:
        return from_html(data["text/html"])
    return data.get("text/markdown", "").strip() or fenced(data["text/plain"])


def make(
    folder: Path,  # the root of the project
) -> dict[str, bytes]:  # path from there → content, of README.md and its pictures
    "README.md and its pictures; raises `UserError` for a link to a file that is not there and for a cell that failed."
    parts, files = [NOTICE], {}

    def relink(match):
        path = os.path.normpath(f"nbs/{match[1]}")
        if not (folder / path).exists():
            raise UserError(f"nbs/index.ipynb links to {path}, which is not there")
        return f"]({path}"

    for i, cell in enumerate(nbformat.read(folder / "nbs/index.ipynb", as_version=4).cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((?![a-z]+:|#)([^)\s#]+)", relink, cell.source.strip()))
        elif cell.cell_type == "code":
            code, outputs = shown(cell)
            parts += [fenced(code, "python")] if code.strip() else []
            parts += [from_output(output, f"docs/images/index_{i}_{j}", files) for j, output in enumerate(outputs)]
    return {"README.md": ("\n\n".join(filter(None, parts)) + "\n").encode(), **files}


def stale(folder: Path) -> dict[str, bytes | None]:  # path → what it should hold; None: a picture that is made no more
    "What has to be made again."
    files = make(folder)
    gone = {p.relative_to(folder).as_posix() for p in (folder / "docs/images").glob("index_*")} - set(files)
    return {p: body for p, body in files.items() if not (folder / p).is_file() or (folder / p).read_bytes() != body} | dict.fromkeys(gone)


def main(args: list[str]) -> int:  # exit status
    try:
        folder = root()
        old = stale(folder)
        for path, body in old.items() if "--check" not in args else ():
            (folder / path).unlink() if body is None else write_bytes(folder / path, body)
        if "--check" in args and old:
            print(f"stale: {', '.join(old)}. nbs/index.ipynb has changed; `make readme` makes them again", file=sys.stderr)
        return int("--check" in args and bool(old))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
