"""README.md from nbs/index.ipynb.

python docs/readme.py           write README.md and its pictures (docs/images)
python docs/readme.py --check   exit status 1 when they are stale
"""

import argparse
import base64
import re
import sys
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from cells import relink, shown

from poetry_iter.core import UserError, root, write_bytes, write_text

NOTICE = "<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->"
PICTURES = {"image/png": "png", "image/svg+xml": "svg", "image/jpeg": "jpg"}
BLOCKS = ["p", "div", "br", "tr", "li", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "table", "details", "summary"]


def fenced(text: str, language: str = "") -> str:
    "A fenced block, its fence longer than any in the text."
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(
    html,  # a parsed <table>
) -> str:
    "A markdown table; rows of a head with several levels are joined."
    rows = [[c.get_text(" ", strip=True).replace("|", "\\|") for c in row.find_all(["td", "th"])] for row in html.find_all("tr")]
    rows = [row for row in rows if row]
    n_head = len(html.thead.find_all("tr")) if html.thead else 1
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    head = [" ".join(filter(None, column)) for column in zip(*rows[:n_head], strict=True)]
    right = [all(re.fullmatch(r"[-+−–.,\d%e ]*", row[i]) for row in rows[n_head:]) for i in range(width)]
    line = lambda row: f"| {' | '.join(row)} |"
    return "\n".join([line(head), line(["---:" if r else "---" for r in right]), *map(line, rows[n_head:])])


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
    parts = [part for text, t in zip(texts, [*tables, ""], strict=True) for part in (fenced(text) if text.strip() else "", t)]
    return "\n\n".join(filter(None, parts))


def from_output(
    output,  # of a code cell
    picture: str,  # path of a picture, without suffix
    files: dict[str, bytes],  # pictures are added here
) -> str:  # empty when it says nothing
    "An output of a cell as markdown."
    if output.output_type == "error":
        raise UserError(f"nbs/index.ipynb: a cell ended in {output.ename}: {output.evalue}; run the notebook again")
    if output.output_type == "stream":
        return fenced(re.sub(r"\x1b\[[0-9;]*m", "", output.text)) if output.name == "stdout" and output.text.strip() else ""
    data = output.data
    for mime, suffix in PICTURES.items():
        if mime in data:
            path, body = f"{picture}.{suffix}", data[mime]
            files[path] = body.encode() if mime == "image/svg+xml" else base64.b64decode(body)
            return f"![]({path})"
    if "text/markdown" in data:
        return data["text/markdown"].strip()
    if "text/html" in data:
        return from_html(data["text/html"])
    return fenced(data["text/plain"]) if data.get("text/plain", "").strip() else ""


def make(
    folder: Path,  # the root of the project
) -> dict[str, bytes]:  # path from there → content, of README.md and its pictures
    "README.md and its pictures; raises `UserError` for a link to a file that is not there and for a cell that failed."
    source, files = folder / "nbs/index.ipynb", {}
    if not source.is_file():
        raise UserError(f"{source}: there is no such file, so README.md cannot be made from it")

    def target(path):
        if not path.exists():
            raise UserError(f"nbs/index.ipynb links to {path.relative_to(folder)}, which is not there")
        return path.relative_to(folder).as_posix()

    parts = [NOTICE]
    for i, cell in enumerate(nbformat.read(source, as_version=4).cells):
        if cell.cell_type == "markdown":
            parts.append(relink(cell.source.strip(), source.parent, target))
        if cell.cell_type != "code":
            continue
        code, outputs = shown(cell)
        if code.strip():
            parts.append(fenced(code, "python"))
        parts += [from_output(output, f"docs/images/index_{i}_{j}", files) for j, output in enumerate(outputs)]
    return {"README.md": ("\n\n".join(filter(None, parts)) + "\n").encode(), **files}


def stale(
    folder: Path,
) -> list[str]:  # paths that differ from what the notebook makes, also pictures that it makes no more
    "What has to be made again."
    files = make(folder)
    have = {p.relative_to(folder).as_posix() for p in (folder / "docs/images").glob("index_*")}
    old = [path for path, body in files.items() if not (folder / path).is_file() or (folder / path).read_bytes() != body]
    return old + sorted(have - set(files))


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when README.md is stale")
    check = parser.parse_args(args).check
    try:
        folder = root()
        files, old = make(folder), stale(folder)
        if check:
            if old:
                print(
                    f"stale: {', '.join(old)}. nbs/index.ipynb has changed; `make readme` makes them again",
                    file=sys.stderr,
                )
            return int(bool(old))
        for path in old:
            if path not in files:
                (folder / path).unlink()
            elif path.endswith(".md"):
                write_text(folder / path, files[path].decode())
            else:
                write_bytes(folder / path, files[path])
        print(folder / "README.md")
        return 0
    except UserError as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
