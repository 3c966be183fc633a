"""What of a notebook a reader sees: nbdev's directive lines and hidden cells left out. For the site and for README.md."""

import re

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.+?)\s*$")
NO_SOURCE = {"hide", "hide_input", "echo: false", "include: false", "default_exp"}
NO_OUTPUT = {"hide", "hide_output", "output: false", "include: false"}


def directives(
    source: str,  # of a code cell
) -> set[str]:  # as {"export"} or {"default_exp core", "default_exp"}: whole, and the first word alone
    "nbdev's directives at the head of a cell."
    lines = [match[1] for line in source.splitlines() if (match := DIRECTIVE.match(line))]
    whole = [re.sub(r"\s*:\s*", ": ", line) for line in lines]
    return {*whole, *(line.split()[0] for line in whole)}


def shown(
    cell,  # a code cell
) -> tuple[str, list]:  # its source without directive lines, and its outputs; empty where hidden
    "What a reader sees of a code cell."
    flags = directives(cell.source)
    source = "\n".join(line for line in cell.source.splitlines() if not DIRECTIVE.match(line)).strip("\n")
    return ("" if flags & NO_SOURCE else source), ([] if flags & NO_OUTPUT else cell.get("outputs", []))
