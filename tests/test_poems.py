"""Poems from any file: read, or refused in a sentence; alike ones found; nothing that a terminal would obey."""

import csv
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poetry_iter.core import UserError, append_jsonl, dumps, iter_jsonl, plain, read_jsonl, read_text, root, shared_data
from poetry_iter.poems import READERS, Poem, clean, components, families, load_poems, words

EXAMPLES = int(os.environ.get("POEM_FUZZ", 200))
ODD = [
    "---",
    "\n\n\n",
    '"',
    ",",
    ";",
    "\t",
    "\x00",
    "\x1b[2J",
    "<b>",
    "{",
    "}",
    "[",
    '{"title": ',
    '"text": "a"',
    "\ufeff",
    "\\ud83d",
    "NaN",
    "1e999",
    "by ",
    "title,text\n",
    "poem\n",
    "é",
    "\r",
    "ﷺ",
]
pieces = st.one_of(
    st.sampled_from(ODD).map(lambda s: s.encode()), st.binary(max_size=20), st.text(max_size=20).map(lambda s: s.encode(errors="surrogatepass"))
)
endings = st.sampled_from([*READERS, ".TXT", ".doc"])


def told(path, **kwargs) -> tuple[list, list]:
    """The poems of a file and what was dropped, or nothing where it was refused in one sentence."""
    try:
        poems, dropped = load_poems(path, **kwargs)
    except UserError as e:
        assert str(e) and str(path.parent) in str(e), e
        return [], []
    assert len({p.id for p in poems}) == len(poems)
    for p in poems:
        assert words(p.content) and p.title == " ".join(p.title.split()) and p.content == clean(p.content)
        assert json.loads(dumps(p.row()).encode()) == p.row() and p._repr_markdown_()
    assert all(d.where and d.reason for d in dropped)
    return poems, dropped


def a_file(data: bytes, ending: str) -> tuple[list, list]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"some_poems{ending}"
        path.write_bytes(data)
        told(path, strict=True)
        return told(path, strict=False)


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(st.lists(pieces, max_size=30).map(b"".join), endings)
def test_any_bytes_are_poems_or_a_sentence(data, ending):
    a_file(data, ending)


def seeds() -> list[tuple[bytes, str]]:
    """Whole files of every kind, for `fuzz_poem_files` to damage."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"title": p.title, "content": p.content, "author": p.author} for p in load_poems(root() / "data/tiny_poems.jsonl")[0][:4]]
    table, sheet, parquet, arrow = pa.Table.from_pylist(rows), io.StringIO(), io.BytesIO(), io.BytesIO()
    writer = csv.DictWriter(sheet, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table)
    texts = "\n\n\n".join(f"{r['title']}\n\n{r['content']}" for r in rows)
    return [
        ("\n".join(map(json.dumps, rows)).encode(), ".jsonl"),
        (json.dumps(rows).encode(), ".json"),
        (texts.encode(), ".txt"),
        (sheet.getvalue().encode(), ".csv"),
        (sheet.getvalue().replace(",", "\t").encode(), ".tsv"),
        (parquet.getvalue(), ".parquet"),
        (arrow.getvalue(), ".arrow"),
    ]


def fuzz_poem_files(n: int, seed: int = 0) -> dict[str, int]:
    """Damage whole poem files n times; how many gave poems, and how many a sentence. Anything else raises."""
    draw, files, found = random.Random(seed), seeds(), {"poems": 0, "refused": 0}
    for _ in range(n):
        data, ending = draw.choice(files)
        data = bytearray(data)
        for _ in range(draw.randint(0, 4)):
            a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
            b = min(b, a + draw.choice([1, 2, 8, 64, 10_000]))
            data[a:b] = draw.choice([b"", draw.randbytes(b - a), draw.choice(ODD).encode(), bytes(data[a:b]) * 2])
        found["poems" if a_file(bytes(data), ending)[0] else "refused"] += 1
    return found


def test_damaged_files_are_poems_or_a_sentence():
    found = fuzz_poem_files(EXAMPLES)
    assert found["poems"] and found["refused"] and sum(found.values()) == EXAMPLES


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(st.text())
def test_plain_is_shown_and_not_obeyed(text):
    said = plain(text)
    assert plain(said).encode() == said.encode() and "\n" not in plain(text, lines=False)
    assert not [
        c
        for c in said
        if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E or 0x2066 <= ord(c) <= 0x2069 or c == "\u200b"
    ]


def test_orders_to_a_terminal():
    for order in (
        "\x1b[31m",
        "\x1b]0;title\x07",
        "\x1b]8;;http://a\x1b\\",
        "\x9b2J",
        "\x9d0;x\x9c",
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\x07",
        "\x1bP1$q\x1b\\",
    ):
        assert plain(f"a{order}b") == "ab", order
    assert plain("\x1b]never ended\nnext") == "]never ended\nnext"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nowhere", "large"])
def test_only_regular_files_of_a_size(tmp_path, kind):
    path = tmp_path / "poems.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "device":
        path.symlink_to("/dev/zero")
    if kind == "folder":
        path.mkdir()
    if kind == "large":
        path.write_text('{"title": "A", "content": "b"}\n' * 10)
    expected = {
        "pipe": "a pipe, a socket or a device",
        "device": "a pipe, a socket or a device",
        "folder": "no .jsonl",
        "nowhere": "there is no such file",
        "large": "more than the 100 that",
    }
    with pytest.raises(UserError, match=expected[kind]):
        load_poems(path, most=100)
    if kind != "folder":
        with pytest.raises(UserError):
            read_text(path, most=100)


def test_only_the_tail_of_a_growing_file_is_read(tmp_path):
    import tracemalloc

    path = tmp_path / "grows.jsonl"
    with open(path, "wb") as f:
        f.truncate(64 << 20)
        f.seek(0, os.SEEK_END)
        f.write(b"\n" + b'{"half": ' + b"1" * 50_000)
    tracemalloc.start()
    append_jsonl(path, [{"whole": 1}])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with open(path, "rb") as f:
        f.seek(64 << 20)
        assert f.read() == b'\n{"whole": 1}\n'


def test_half_a_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    assert read_jsonl(path, grows=True) == [{"a": 1}, {"a": 2}] and [n for n, _ in iter_jsonl(path)] == [1, 3, 4]
    assert read_jsonl(tmp_path / "none.jsonl", grows=True) == []


SONNET = "\n".join(
    f"The {w} goes on and on along the wall" for w in "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
)


@pytest.mark.parametrize(
    ("name", "text", "titles"),
    [
        ("my_sonnet.txt", SONNET, ["my sonnet"]),
        ("a.txt", f"Wall\n\n{SONNET}", ["Wall"]),
        ("a.txt", f"Wall\nby Nobody\n\n{SONNET}", ["Wall"]),
        ("a.txt", "O wall,\n\nthat goes on", ["a"]),
        ("two.txt", f"Wall\n\n{SONNET}\n\n\n\nDoor\n\nIt opens\nand shuts.", ["Wall", "Door"]),
        ("two.txt", f"WALL\n\n\n{SONNET}\n\n\nDOOR\n\n\nIt opens\nand shuts.", ["WALL", "DOOR"]),
        ("two.txt", f"{SONNET}\n---\nDoor\n\nIt opens\nand shuts.", ["two 1", "Door"]),
        ("one.txt", "Wall\n\nIt goes on\n\n\nand on,\n\n\nand on.", ["Wall"]),
        ("a.csv", 'Name,Body\nDoor,"It opens\nand shuts."\n', ["Door"]),
        ("a.csv", "id;verse\n1;It opens\n2;It shuts\n", ["a 1", "a 2"]),
        ("a.tsv", "title\tpoet\tlines\nDoor\tNobody\tIt opens\n", ["Door"]),
        ("a.json", '{"title": "Door", "lines": ["It opens", "and shuts."]}', ["Door"]),
        ("a.jsonl", '{"text": "Door\\n\\nIt opens"}\n{"text": "It shuts"}\n', ["Door", "a 2"]),
    ],
)
def test_my_poems_just_work(tmp_path, name, text, titles):
    (tmp_path / name).write_text(text)
    for path in (tmp_path / name, tmp_path):
        poems, dropped = load_poems(path)
        assert [p.title for p in poems] == titles and not dropped
        inferred = [t for t in titles if t not in ("Door", "Wall") or name in ("a.txt", "two.txt", "one.txt")]
        assert all("inferred" in p.extra for p in poems if p.title in inferred)


def test_what_datasets_has_saved(tmp_path):
    import datasets

    rows = [{"title": "Door", "text": "It opens\nand shuts."}, {"title": "Wall", "text": SONNET}]
    datasets.disable_progress_bars()
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows[1:])})
    saved.save_to_disk(tmp_path / "both")
    saved["train"].to_parquet(tmp_path / "one.parquet")
    saved["train"].save_to_disk(tmp_path / "one")
    assert {p.title for p in load_poems(tmp_path / "both")[0]} == {"Door", "Wall"}
    assert [p.title for p in load_poems(tmp_path / "one.parquet")[0]] == [p.title for p in load_poems(tmp_path / "one")[0]] == ["Door"]


def test_a_folder_says_what_it_left_out(tmp_path):
    (tmp_path / "a.txt").write_text(f"Wall\n\n{SONNET}")
    (tmp_path / "b.doc").write_text("x")
    (tmp_path / "c.txt").write_bytes("Düne\n\nSand".encode("latin-1"))
    poems, dropped = load_poems(tmp_path, strict=False)
    assert len(poems) == 1 and [d.reason.split(" ")[0] for d in dropped] == [".doc:", "not"]
    with pytest.raises(UserError, match=r"c\.txt: not UTF-8"):
        load_poems(tmp_path)


def test_markup_is_shown_and_not_obeyed():
    shown = Poem("<img src=x>", "# a\n1. b\n    c *d* $e$\n\x1b[2Jf", "`g`")._repr_markdown_()
    assert "<img" not in shown and "\n# " not in shown and "\x1b" not in shown and "\\*d\\*" in shown and "&nbsp;&nbsp;&nbsp;&nbsp;c" in shown


def alike(n: int) -> list[Poem]:
    """So many versions of one poem, each with two lines of its own."""
    draw = random.Random(1)
    line = lambda: " ".join(f"w{draw.randrange(3000)}" for _ in range(8))
    base = [line() for _ in range(16)]
    return [Poem(str(i), "\n".join(line() if k in (i % 16, (i * 7 + 1) % 16) else b for k, b in enumerate(base))) for i in range(n)]


def test_many_alike_take_time_in_proportion():
    def seconds(n):
        poems, began = alike(n), time.process_time()
        assert set(families(poems)) == {0}
        return time.process_time() - began

    seconds(50)  # imports
    assert seconds(4000) < 8 * max(0.1, seconds(1000))  # 4 by proportion, 16 by squares


def test_families_are_those_of_a_plain_comparison():
    path = shared_data("more_poems.jsonl")
    if path is None:
        pytest.skip("../shared/data is not here: 6,060 public-domain poems for tests")
    draw, poems = random.Random(0), load_poems(path)[0][::20]
    for p in draw.sample(poems, 60):  # versions and excerpts
        lines = p.content.split("\n")
        for k in draw.sample(range(len(lines)), len(lines) // draw.choice([2, 3, 4, 8])):
            lines[k] = " ".join(sorted(lines[k].split()))
        poems.append(Poem(p.title, "\n".join(lines[draw.randrange(3) : len(lines) // draw.choice([1, 1, 2])]) or "x"))
    sets = [{tuple(w[i : i + 3]) for i in range(max(1, len(w) - 2))} for w in (words(p.content) for p in poems)]
    lines = [{k for line in p.lines if len(k := tuple(words(line))) > 3} for p in poems]
    pairs = [(i, j) for j in range(len(poems)) for i in range(j)]
    similar = lambda i, j: len(sets[i] & sets[j]) >= 0.5 * len(sets[i] | sets[j])
    in_common = lambda i, j: len(lines[i] & lines[j]) >= max(2, min(len(lines[i]), len(lines[j])) / 3)
    expected = components(len(poems), [(i, j) for i, j in pairs if similar(i, j) or in_common(i, j)]).tolist()
    assert families(poems) == expected and len(set(expected)) < len(poems)


def test_a_poem_is_checked_without_torch(tmp_path):
    (tmp_path / "a.txt").write_text(f"Wall\n\n{SONNET}")
    code = (
        "import sys; from poetry_iter.pipeline.command_line import main; s = main(['poems', 'check', sys.argv[1]]); print(s, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], capture_output=True, text=True, cwd=root())
    assert done.stdout.splitlines() == [
        "inferred Wall: title from the first line",
        "1 kept in 1 families of near-duplicates, 0 dropped",
        "0 False",
    ], done
