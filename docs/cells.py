"""What of a notebook a reader sees: nbdev's directive lines and hidden cells left out. For the site and for README.md."""

import os
import re
from collections.abc import Callable
from pathlib import Path

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.+?)\s*$")
NO_SOURCE = {"hide", "hide_input", "echo: false", "include: false", "default_exp"}
NO_OUTPUT = {"hide", "hide_output", "output: false", "include: false"}
LINK = re.compile(r"(\]\()([^)\s]+)(?=[)\s])|(<img [^>]*?src=\")([^\"]+)(?=\")")
FENCE = re.compile(r"(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$)", re.M | re.S)


def directives(
    source: str,  # of a code cell
) -> set[str]:  # as {"export"} or {"default_exp core", "default_exp"}: whole, and the first word alone
    "nbdev's directives at the head of a cell."
    found = set()
    for line in source.splitlines():
        if not line.strip():
            continue
        if not (match := DIRECTIVE.match(line)):
            break
        whole = re.sub(r"\s*:\s*", ": ", match[1])
        found |= {whole, whole.split()[0]}
    return found


def shown(
    cell,  # a code cell
) -> tuple[str, list]:  # its source without directive lines, and its outputs; empty where hidden
    "What a reader sees of a code cell."
    flags = directives(cell.source)
    source = "\n".join(line for line in cell.source.splitlines() if not DIRECTIVE.match(line)).strip("\n")
    return ("" if flags & NO_SOURCE else source), ([] if flags & NO_OUTPUT else cell.get("outputs", []))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    "Change the text of a markdown cell, its fenced code blocks left alone."
    parts = FENCE.split(text)  # text, fenced block, its fence, text, …
    return "".join(change(part) if i % 3 == 0 else part if i % 3 == 1 else "" for i, part in enumerate(parts))


def relink(
    text: str,  # of a markdown cell
    folder: Path,  # where the notebook lies
    target: Callable[[Path], str | None],  # file in the project → the new link; None: it stays as it is
) -> str:
    "Change the links of a markdown cell that lead to files."

    def swap(match):
        head, link = (match[1], match[2]) if match[1] else (match[3], match[4])
        path, hash_, anchor = link.partition("#")
        if not path or re.match(r"[a-z][a-z0-9+.-]+:", path):
            return match[0]
        new = target(Path(os.path.normpath(folder / path)))
        return match[0] if new is None else f"{head}{new}{hash_}{anchor}"

    return outside_code(text, lambda part: LINK.sub(swap, part))
