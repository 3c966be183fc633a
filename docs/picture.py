"""docs/static/poem.svg, the picture of the README: a shipped poem, each word on the colour of what its description took off its loss, and its verse in the margin. `python docs/picture.py` makes it again, in a quarter of a minute."""

import html
import sys
import unicodedata

from poetry_iter.core import root, write_text
from poetry_iter.descriptions import describe
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.poems import load_poems
from poetry_iter.scoring import score, token_gains
from poetry_iter.verse.cards import marks
from poetry_iter.verse.forms import report

SIZE, LINE, FULL = 15, 40, 3.0  # of a letter, of a line with its marks, nats at full colour
WIDE = SIZE * 0.602  # of a letter that is as wide as any other
TITLE = "Pruning Lesson"  # of a shipped poem
COLORS = ["#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#148f77", "#a04000"]


def text(x: float, y: float, words: str, **said) -> str:
    "A piece of text; a length is kept whatever the font is."
    more = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in said.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve" {more}>{html.escape(words)}</text>'


def by_line(gains: list[tuple[str, float]], lines: list[str]) -> list[list[tuple[int, int, float]]]:
    "(from, to, gain) of each token in each line of the poem."
    whole, found, at = "".join(t for t, _ in gains), [[] for _ in lines], 0
    begin, edges = whole.index("\n"), []  # behind the title
    for line in lines:
        begin = whole.index(line, begin)
        edges.append((begin, begin + len(line)))
        begin += len(line)
    for token, gain in gains:
        for n, (a, b) in enumerate(edges):
            if (low := max(a, at)) < (high := min(b, at + len(token))):
                found[n].append((low - a, high - a, gain))
        at += len(token)
    return found


def picture(title: str, description: str, gains: list[tuple[str, float]], content: str) -> str:
    "The poem as SVG."
    found = report(content)
    rows, letters = found["lines"], [r["rhyme"] for r in found["lines"]]
    order = {c: i for i, c in enumerate(dict.fromkeys(c for c in letters if letters.count(c) > 1))}
    spans, parts, y, stanza = by_line(gains, [r["text"] for r in rows]), [], 92, 1
    for row, pieces in zip(rows, spans, strict=True):
        y, stanza = y + (16 if row["stanza"] != stanza else 0), row["stanza"]
        color = COLORS[order[row["rhyme"]] % len(COLORS)] if row["rhyme"] in order else "#999999"
        for a, b, gain in pieces:
            parts.append(f'<rect x="{56 + a * WIDE:.1f}" y="{y - SIZE:.1f}" width="{(b - a) * WIDE:.1f}" height="{SIZE + 6}" fill="{"#2a9d5c" if gain > 0 else "#d1495b"}" fill-opacity="{min(1, abs(gain) / FULL) * 0.85:.2f}"/>')
        stress = marks(row["text"], row["syllables"], row["stresses"]).rstrip()
        for at, mark in enumerate(stress):
            if not mark.isspace():
                parts.append(text(56 + at * WIDE, y - SIZE - 1, unicodedata.normalize("NFC", mark), fill=color))
        parts += [text(28, y, row["rhyme"], fill=color, font_weight="bold"), text(56, y, row["text"], fill="#1b1b1b", textLength=f"{len(row['text']) * WIDE:.1f}", lengthAdjust="spacingAndGlyphs")]
        y += LINE
    best = found["forms"][0]
    told = f"{best['form']} · {found['meter']['name']} · rhyme {found['rhyme']['scheme']}"
    words, lines, width = description.split(), [""], 84
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    parts += [text(28, y + 4, told, fill="#666666", font_size=12)]
    parts += [text(28, y + 34 + 17 * n, line, fill="#457b9d", font_size=13, font_style="italic") for n, line in enumerate(lines)]
    y += 34 + 17 * len(lines)
    parts += [text(28, y + 12, "green: what the description took off a token's loss; red: what it added; full colour at 3 nats", fill="#888888", font_size=11)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {y + 30}" width="760" height="{y + 30}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{SIZE}" role="img">'
    about = f"<title>{html.escape(title)}, coloured by what its description gave</title>"
    return "\n".join([head, about, f'<rect width="760" height="{y + 30}" rx="8" fill="#ffffff" stroke="#cccccc"/>', text(28, 44, title, fill="#1b1b1b", font_weight="bold", font_size=19), *parts, "</svg>"]) + "\n"


def main(title: str) -> None:
    "Describe, score, colour."
    lm = open_engine(ModelSpec())
    poems = {p.title: p for p in load_poems(root() / "data/tiny_poems.jsonl")[0]}
    poem = poems[title]
    others = [p for p in poems.values() if p.id != poem.id][:1]
    rows = score(lm, [poem, *others], describe(lm, [poem, *others], n=6, sampling=Sampling(max_new_tokens=160)))
    best = max((r for r in rows if r["poem_id"] == poem.id), key=lambda r: r["gain"])
    path = write_text(root() / "docs/static/poem.svg", picture(poem.title, best["description"], token_gains(lm, poem, best["description"]), poem.content))
    print(f"{path.relative_to(root())}: {poem.title}, gain {best['gain']:.3f} nats a token")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else TITLE)
