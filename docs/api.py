"""An API page a module, read from its source: nothing is imported, so that no page waits for torch.

The comment beside a parameter (fastcore's docments) becomes its row in a table.
"""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

Row = tuple[str, str, str, str]  # of a table: name, type, default, meaning


def comments(source: str) -> dict[int, str]:  # line → text of the comment on it
    "The comments of a module by line."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}


def parameters(
    node: ast.FunctionDef,
    notes: dict[int, str],  # the module's comments
    skip: int = 0,  # leave out the first ones: 1 for a method's self
) -> list[Row]:  # `returns` comes last, where something is said of it
    "What is said of each parameter of a function, and of what it returns."
    a, text = node.args, lambda n: ast.unparse(n) if n else ""
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [(arg.arg, arg, default) for arg, default in zip(plain, defaults, strict=True)][skip:]
    found += [("*" + a.vararg.arg, a.vararg, None)] if a.vararg else []
    found += [(arg.arg, arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    found += [("**" + a.kwarg.arg, a.kwarg, None)] if a.kwarg else []
    line = {name: (default or arg).end_lineno for name, arg, default in found}
    if node.returns:
        line["returns"] = node.returns.end_lineno
    owner = {n: name for name, n in line.items()}  # a comment belongs to the last name on its line
    note = {name: notes[n] for n, name in owner.items() if n in notes}
    rows = [(name, text(arg.annotation), text(default), note.get(name, "")) for name, arg, default in found]
    return rows + ([("returns", text(node.returns), "", note["returns"])] if "returns" in note else [])


def fields(node: ast.ClassDef, notes: dict[int, str]) -> list[Row]:
    "The annotated fields of a class, as of a dataclass."
    found = [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
    text = lambda n: ast.unparse(n) if n else ""
    default = lambda text: re.sub(r"^field\(.*?default(?:_factory=(\w+)|=([^,)]+)).*", lambda m: m[2] or f"{m[1]}()", text)
    return [(n.target.id, text(n.annotation), default(text(n.value)), notes.get(n.end_lineno, "")) for n in found]


def table(rows: list[Row]) -> list[str]:  # lines; none when no row has a meaning
    "A table of parameters, without the columns that are empty."
    if not any(row[3] for row in rows):
        return []
    kept = [i for i in range(4) if any(row[i] for row in rows)]
    plain = lambda text: " ".join(text.split()).replace("|", "\\|")
    prose = lambda text: re.sub(r"`[^`]*`|<", lambda m: m[0] if m[0] != "<" else "\\<", plain(text))
    code = lambda text: f"`{plain(text)}`" if text else ""
    cells = lambda name, *rest: ["*returns*" if name == "returns" else code(name), *map(code, rest[:2]), prose(rest[2])]
    lines = [["parameter", "type", "default", "meaning"], ["---"] * 4, *(cells(*row) for row in rows)]
    return ["", *(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)]


def signature(node: ast.FunctionDef, skip: int = 0, bare: bool = False) -> str:
    "The parameters in parentheses; bare: without types, for a function whose table tells them."
    args = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0].args
    del (args.posonlyargs or args.args)[:skip]
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg and bare:
            arg.annotation = None
    return f"({ast.unparse(args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def directive(kind: str, head: str, options: list[str], *body: list[str], depth: int = 3) -> list[str]:
    "A directive of Sphinx's Python domain."
    fence = ":" * depth
    return ["", f"{fence}{{py:{kind}}} {head}", *options, "", *(line for part in body for line in part), fence]


def function(node: ast.FunctionDef, notes: dict[int, str], method: bool = False) -> list[str]:
    "A function or method: signature, docstring, table."
    tags = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    skip = int(method and "staticmethod" not in tags)
    said = (ast.get_docstring(node) or "").split("\n")
    if tags & {"property", "cached_property"}:
        options = [f":type: {json.dumps(ast.unparse(node.returns))}"] if node.returns else []
        return directive("property", node.name, options, said)
    rows = table(parameters(node, notes, skip))
    options = [f":{tag}:" for tag in ("classmethod", "staticmethod") if tag in tags] if method else []
    return directive("method" if method else "function", node.name + signature(node, skip, bare=bool(rows)), options, said, rows)


def class_(node: ast.ClassDef, notes: dict[int, str]) -> list[str]:
    "A class: how it is made, its docstring, fields, and methods that have a docstring or are properties."
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    told = lambda n: ast.get_docstring(n) or any("property" in ast.unparse(d) for d in n.decorator_list)
    bases = ", ".join(f"`{ast.unparse(b)}`" for b in node.bases)
    if init := methods.get("__init__"):
        rows = table(parameters(init, notes, 1))
        head = signature(init, 1, bare=bool(rows)).partition(" -> ")[0]
    else:
        listed = fields(node, notes)
        rows = table(listed)
        said = lambda name, kind, default: (name if rows else f"{name}: {kind}") + (f"={default}" if default else "")
        head = f"({', '.join(said(*row[:3]) for row in listed)})" if listed else ""
    said = [*(ast.get_docstring(node) or "").split("\n"), *(["", f"A kind of {bases}."] if bases else [])]
    inner = [line for n in methods.values() if told(n) and not n.name.startswith("_") for line in function(n, notes, method=True)]
    return directive("class", node.name + head, [], said, rows, inner, depth=4)


def value(node: ast.Assign | ast.AnnAssign, name: str, notes: dict[int, str]) -> list[str]:
    "A module's constant, with its value where that is short."
    text = ast.unparse(node.value) if node.value else ""
    note = notes.get(node.end_lineno, "")
    return directive(
        "data",
        name,
        [f":value: {json.dumps(text, ensure_ascii=False)}"] if len(text) <= 80 and "\n" not in text else [],
        [note],
    )


def module(
    path: Path,  # of a module that nbdev exported
    name: str,  # as poetry_iter.core
) -> tuple[list[str], list[str]]:  # the lines of its page, and the names that it exports
    "A module's page: what its `__all__` names, in the order of its source."
    source = path.read_text(encoding="utf-8")
    tree, notes = ast.parse(source), comments(source)
    targets = lambda n: [t.id for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)]
    assigns = [(n, t) for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) for t in targets(n)]
    exported = next((ast.literal_eval(n.value) for n, t in assigns if t == "__all__"), [])
    notebooks = dict.fromkeys(re.findall(r"^# %% \.\./nbs/(\S+\.ipynb)", source, re.M))
    made = ", ".join(f"[nbs/{n}](../{n})" for n in notebooks)
    lines = [f"# {name}", "", f"> {ast.get_docstring(tree) or ''}", "", f":::{{py:module}} {name}", ":::"]
    if made:
        lines += ["", f"Explained and tested in {made}."]
    for node in tree.body:
        if getattr(node, "name", None) in exported:
            lines += class_(node, notes) if isinstance(node, ast.ClassDef) else function(node, notes)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in targets(node):
                if target in exported:
                    lines += value(node, target, notes)
    return lines, exported
