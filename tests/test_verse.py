"""Properties of the verse tools: rhyme, meter, forms, and every bad input."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poetry_iter.core import UserError, read_jsonl, root, shared_data
from poetry_iter.verse import cards, forms, meter, rhyme, rhyme_odds, schemes, syllables
from poetry_iter.verse.pronunciation import line_words, pronounce

SONNET = """The lamp is low, the river takes the light,
And one by one the windows of the town
Go dark, as if some hand within the night
Had pulled the curtain of the evening down.
I walk the quay, and count the boats that sleep,
Each with its rope, its number and its name,
And think how little of the day I keep,
How much is spent the moment that it came.
A bell is struck; the echo goes away
Across the water to the other shore,
And nothing that it touched can make it stay,
And nothing that it said was said before.
So let me learn of water and of sound
To go, and leave no trouble on the ground."""  # written for this test

LIMERICK = """There once was a clerk from the bay
Who counted his buttons all day;
When one of them fell
He rang for the bell
And carried the button away."""

PROSE = (
    "In the morning the square was empty except for the man who sold newspapers and the dog that belonged to nobody, and "
    "they looked at each other as two people look who have met before in another town and cannot say where it was. "
    "Later it rained, and the man put the papers under his coat and the dog went wherever it is that dogs go in the rain."
)
WORDS = st.sampled_from(
    "love prove day may night light river shiver stone gone city happy cat the of wandering heaven over sea free o'er 'tis".split()
)
LINES = st.lists(st.lists(WORDS, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=20)
ANYTHING = st.text(max_size=80)


@settings(deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5).map(" ".join))
def test_a_line_rhymes_with_itself_as_identical(line):
    assert rhyme.pair(line, line).kind == "identical"
    assert rhyme.pair(line, line.upper() + "!").kind == "identical"


@settings(deadline=None)
@given(WORDS, WORDS)
def test_a_pair_is_symmetric_and_scored(a, b):
    x, y = rhyme.pair(a, b), rhyme.pair(b, a)
    assert x.kind == y.kind and x.score == pytest.approx(y.score)
    assert 0 <= x.score <= 1 and a in x.reason


@settings(deadline=None)
@given(LINES, st.booleans())
def test_a_scheme_ignores_case_and_punctuation_and_is_canonical(lines, context):
    found = rhyme.scheme(lines, context=context)
    assert found == rhyme.scheme([line.upper() + " ;" for line in lines], context=context)
    assert found == rhyme.scheme("\r\n".join(lines), context=context)
    assert len(found) == len(lines) and found == schemes.canonical(found)


@settings(deadline=None)
@given(LINES, st.text(alphabet="AB", min_size=1, max_size=12))
def test_deviations_name_real_lines_and_rewards_are_shares(lines, wanted):
    for d in rhyme.deviations(lines, wanted):
        assert 1 <= d.line <= len(lines) and 0 <= d.other <= len(lines)
    assert 0 <= rhyme.reward(lines, wanted) <= 1


@settings(deadline=None)
@given(ANYTHING)
def test_no_text_breaks_anything(text):
    assert len(rhyme.scheme(text)) == len(text.splitlines())
    s = meter.scan(text)
    assert len(s.stresses) == len(s.syllables) and set(s.stresses) <= {"+", "-"}
    meter.poem(text)
    forms.detect(text)
    rhyme.pair(text, "love")


@pytest.mark.parametrize(
    ("a", "b", "kinds"),
    [
        ("day", "may", {"perfect"}),
        ("city", "happy", {"slant", "assonance", "none"}),
        ("love", "prove", {"eye/historic"}),
        ("find her", "kinder", {"perfect"}),
        ("poet", "know it", {"perfect"}),
        ("nation", "station", {"perfect"}),
        ("see", "sea", {"identical"}),
        ("wind", "mind", {"perfect"}),
        ("cat", "cab", {"assonance", "slant"}),
        ("silver", "orange", {"none"}),
        ("heav'n", "seven", {"slant", "perfect", "eye/historic"}),
    ],
)
def test_kinds_of_pairs(a, b, kinds):
    assert rhyme.pair(a, b).kind in kinds, rhyme.pair(a, b)


def test_no_word_is_dropped():
    assert line_words("“Tis’ th’ o’er-weighted 1914 café, zzyzx!”")
    for word in ["o'er", "heav'n", "wand'ring", "fear'd", "blessèd", "thou'rt", "zzyzx", "xqz", "q", "ñandú", "x" * 500]:
        assert pronounce(line_words(word)[0]).variants[0]


def test_deviations_and_reward_follow_the_scheme():
    assert rhyme.deviations(SONNET, "ABABCDCDEFEFGG") == []
    lines = SONNET.split("\n")
    lines[6] = "And think how little of the day remains,"
    (d,) = rhyme.deviations(lines, "ABABCDCDEFEFGG")
    assert (d.line, d.other, d.kind) == (7, 5, "no rhyme") and d.reason.startswith("line 7 should rhyme with 5")
    good, worse = rhyme.reward(SONNET, "ABABCDCDEFEFGG"), rhyme.reward(lines, "ABABCDCDEFEFGG")
    assert good > 0.9 and worse < good - 0.05
    assert rhyme.reward(SONNET, "AABBCCDDEEFFGG") < 0.5
    assert rhyme.reward("love\nlove\nlove\nlove", "AABB") < 0.5, "one word again and again earns little"
    with pytest.raises(UserError, match="scheme is empty"):
        rhyme.reward(SONNET, " ")


def test_meters():
    scans = meter.poem(SONNET)
    assert scans.meter == "iambic pentameter" and scans.fit > 0.6
    assert [len(s.syllables) for s in scans.lines] == [10] * 14
    assert meter.scan("The lamp is low, the river takes the light").stresses == "-+-+-+-+-+"
    assert meter.scan("Over the mountain and under the tree").family in ("dactylic", "anapestic")
    for s in scans.lines:
        assert "".join(s.feet) == s.stresses and len(s.syllables) == len(s.stresses) == len(s.nominal)


def test_forms():
    assert forms.detect(SONNET)[0].form == "Shakespearean sonnet"
    assert forms.detect(LIMERICK)[0].form == "limerick"
    assert forms.detect(PROSE)[0].form == "prose poem"
    assert not forms.check(PROSE, "sonnet").accepted
    assert not forms.check("A sonnet, a sonnet, I say!\nIt is a sonnet.", "sonnet").accepted
    assert forms.check("an old silent shed\na swallow comes in and stays\nall the long summer", "haiku").accepted
    assert "line 2" in " ".join(forms.check("an old silent shed\na swallow comes in\nall the long summer", "haiku").deviations)
    with pytest.raises(UserError, match="couplet sonnet"):
        forms.check(SONNET, "sonnnet")
    lines = SONNET.split("\n")
    lines[6] = "And think how little of the day remains,"
    assert any(d.startswith("line 7 should rhyme with 5") for d in forms.check("\n".join(lines), "Shakespearean sonnet").deviations)
    assert {m for m in forms.REGISTRY} >= set("villanelle sestina limerick ghazal couplets tercets ballad quatrain haiku".split())


@pytest.mark.parametrize(
    "text", ["", "\n \n", "...!?", "one line", "日本語\nтекст\nλόγος", "😀\n😀 😀", "1 2 3\n4 5 6", "a\r\nb\rc\n\nd", "\x00\x01", "-" * 500]
)
def test_bad_input_gets_an_answer(text):
    assert len(rhyme.scheme(text)) == len(text.splitlines())
    assert 0 <= rhyme.density(text) <= 1
    assert meter.poem(text).fit >= 0
    assert isinstance(forms.detect(text), list)
    assert forms.check(text, "sonnet").accepted is False
    try:
        assert cards.terminal(text) and cards.card(text)
    except UserError as e:
        assert "no text" in str(e)


def test_long_input_stays_linear():
    "Four times the lines, not sixteen times the work: counted in pairs compared, not in seconds."
    lines = SONNET.split("\n") * 720  # 10,080 lines without a break
    small, large = schemes.pair_odds([None] * 2520, [2520])[0][0], schemes.pair_odds([None] * 10080, [10080])[0][0]
    assert len(large[0]) < 4.1 * len(small[0])
    start = time.perf_counter()
    assert len(rhyme.scheme(lines)) == 10080 and len(meter.poem(lines).lines) == 10080
    assert time.perf_counter() - start < 300, "a hang, not a slow machine"
    assert 0 <= rhyme.reward(lines, "AABB") <= 1 and rhyme.deviations(lines, "AABB")
    assert meter.scan("and so " * 1500).stresses and forms.detect("and so " * 1500)


RAVEN_LIKE = """Long ago and late one evening, when the autumn winds were grieving,
When the last of light was leaving harbour wall and harbour bar,
Slowly, slowly, through the shadow, over water, over meadow,
Came a sailor and a widow, came from very, very far.
"Tell me, sailor," said the widow, "was it far, so very far?"
Answered he, "A falling star." """
CHARGE_LIKE = """Half of them, half of them,
Half of them falling,
Over the hill of them
Somebody calling.
Under the hammering,
Blackened and blundering,
Rode they in, stammering,
Hundred on hundred."""
TENDER_LIKE = """Carry her carefully,
Slowly and tenderly;
Look at her, prayerfully,
Lying so slenderly.
Out of the bitterness,
Out of the cold,
Gather her littleness
Into the fold."""


@pytest.mark.parametrize(("text", "family"), [(RAVEN_LIKE, "trochaic"), (CHARGE_LIKE, "dactylic"), (TENDER_LIKE, "dactylic"), (LIMERICK, "anapestic"), (SONNET, "iambic")])
def test_a_poem_has_the_meter_that_its_lines_agree_on(text, family):
    assert meter.poem(text).family == family, meter.poem(text).meter


@pytest.mark.parametrize(
    ("line", "stresses"),
    [
        ("The sailor rocked it to and fro all night", "-+-+-+-+-+"),  # to and fro is not t'and fro
        ("A perilous and a fiery thing to say", "-+-+--+--+-+"),
        ("The ports were shut and closed: villain, I say", "-+-+-++--+"),  # a pause, and a foot turned round
        ("Then, now, and ever will it be", "++-+-+-+"),
        ("Sometimes alone, and sometimes with a friend", "+--+-+-+-+"),
        ("Perfect in patience, perfect in repose", "+--+-+---+"),
        ("He said that all the things that people do", "-+-+-+-+-+"),  # a line does not end in a full word that is weak
        ("The dragon, all refulgent, shook his mane", "-+-+-+-+-+"),
    ],
)
def test_lines_as_people_mark_them(line, stresses):
    found = meter.scan(line)
    assert len(found.stresses) == len(stresses) and sum(a != b for a, b in zip(found.stresses, stresses)) <= 1, (found.stresses, stresses)


def test_syllables_are_cut_as_people_cut_them():
    words = "life-less some-times king-ly earth-ly riv-er o-pen moun-tain glo-ri-ous fin-ger can-dle thought-less"
    for w in words.split():
        assert "-".join(syllables.divided(w.replace("-", ""), w.count("-") + 1)) == w


def test_line_numbers_of_editors_are_no_words():
    assert rhyme.scheme("The tide ran out and left the rocks\nThe night came down to weep 656\nAnd nothing stirred within my mind\nBut wind and wave and sleep") == "ABCB"
    assert meter.poem("I walked along the river wall 5\nAnd thought of nothing much at all").lines[0].meter == "iambic tetrameter"
    assert rhyme.scheme("That was the year of 1810\nAnd I was never there again") == "AA"


def test_an_octave_keeps_its_third_rhyme():
    ends = "grown march arch zone stone space race flown high deep sky sleep by keep".split()
    assert rhyme.scheme([f"and so the river, and the {w}" for w in ends]).startswith("ABBAACCA")


def test_no_pattern_hears_what_nobody_hears():
    stanzas = ["The tide has left the river {}\nAnd nothing comes to keep\nThe {} of the harbour wall\nFrom falling into sleep".format(*w) for w in (("hall", "call"), ("wall", "all"), ("stall", "fall"))]
    odd = "The tide has left the river rocks\nAnd nothing came to keep\nThe harbour wall within my mind\nFrom falling into sleep"
    assert schemes.canonical(rhyme.scheme("\n\n".join([*stanzas, odd])).split(" ")[-1]) == "ABCB"


@pytest.mark.parametrize(("a", "b"), [("teare", "Star"), ("maid", "head"), ("Dye", "Liberty"), ("join", "line"), ("eyes", "destinies"), ("heart", "wert")])
def test_rhymes_of_old_sounds(a, b):
    assert rhyme.pair(a, b).score > rhyme.pair("rocks", "mind").score + 0.15


@pytest.mark.parametrize("head", ["A Sonnet.\n\n{}", "XXIV.\n{}", "JUNE 3, 1802\n\n{}", "ON THE DEATH OF A FAVOURITE LINNET\nWHO DIED IN MAY\n\n{}", '"All things are water."\n\n{}', "To a Friend\n\n{}", "{}\n\nLondon, 1802"])
def test_what_is_no_verse_is_left_out_and_named(head):
    text = head.format(SONNET)
    assert forms.detect(text)[0].form == "Shakespearean sonnet" and forms.detect(text)[0].accepted
    assert forms.report(text)["left_out"] or forms.detect(text)[0].deviations
    if left := forms.report(text)["left_out"]:
        said = cards.terminal(text)  # a heading that comes first is shown as the title
        assert "left out" in cards.card(text) and ("left out" in said or said.split("\n")[0].strip() == left[0]["text"].strip())


def test_sonnets_in_a_row_in_couplets_and_with_a_tail():
    assert forms.detect(SONNET + "\n\n" + SONNET)[0].form == "sonnet sequence"
    assert forms.detect("I\n\n" + SONNET + "\n\nII\n\n" + SONNET)[0].form == "sonnet sequence"
    rows = SONNET.split("\n")
    couplets = "\n".join(rows[k] for k in (0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 13))
    assert forms.detect(couplets)[0].form == "couplet sonnet"


def test_no_form_is_accepted_without_its_rhymes_and_its_length():
    for name in ("rhyme royal", "terza rima", "Spenserian stanza", "ottava rima", "villanelle", "limerick", "haiku", "ballad", "ghazal", "sestina"):
        assert not forms.check(SONNET, name).accepted, name
    five = "\n".join(SONNET.split("\n")[k] for k in (0, 2, 1, 3, 3))
    assert not forms.check(five, "limerick").accepted


def test_a_hymn_of_four_beats_is_no_ballad_and_no_sonnet_is_another():
    hymn = ["The morning breaks upon the hill", "And all the valley wakes to praise", "The wind upon the wheat is still", "And long and lovely are the days"] * 3
    stanzas = "\n\n".join("\n".join(hymn[k : k + 4]) for k in (0, 4, 8))
    assert meter.poem(stanzas).meter == "iambic tetrameter" and not forms.check(stanzas, "ballad").accepted
    assert forms.check(SONNET, "Shakespearean sonnet").accepted and not forms.check(SONNET, "Spenserian sonnet").accepted


def test_forms_of_lines_that_return():
    rows = [f"The {w} is on the river and the {x}" for w in ("rain", "moon", "boat", "lamp", "ice", "bird") for x in ("sea", "land")]
    assert forms.detect("\n".join(rows[k] for k in (0, 1, 2, 3, 1, 4, 3, 5, 4, 6, 5, 7)))[0].form == "pantoum"
    ends = "sea light free night bright day white grey".split()
    stanza = [f"And {k} and so the {w}" for k, w in zip("one two three four five six seven".split(), ends)] + ["And all the world is grey"]
    parts = [[l.replace("And ", f"{w} ", 1) for l in stanza[:-1]] + stanza[-1:] for w in ("When", "Where", "While")]
    parts.append([f"Prince, {l}" for l in stanza[4:-1]] + stanza[-1:])
    assert forms.detect("\n\n".join("\n".join(p) for p in parts[:3]) + "\n\nENVOY\n\n" + "\n".join(parts[3]))[0].form == "ballade"


def test_limericks_in_four_lines_and_three_short_lines():
    four = "There was an old man of the fen\nWho counted his cows up to ten;\nWhen the tenth had gone by, he said with a sigh,\nI shall have to begin it again."
    assert forms.detect(four)[0].form == "limerick"
    assert forms.detect("On a bare branch\na crow has settled\nautumn dusk")[0].form == "three short lines"


def test_what_rhymes_is_not_free():
    uneven = "\n".join(["The cat sat down beside the sea", "And looked at me", "As if the sun had never shone", "And I had gone", "To buy a ribbon and a spoon", "And every afternoon", "We ate", "Our dinner from a silver plate"])
    assert forms.detect(uneven)[0].form != "free verse" and not forms.check(uneven, "free verse").accepted
    ballad = "\n\n".join(["The lord came riding up the hill,\nThe rain was in his hair;\nHe called the lady by her name,\nAnd found no lady there."] * 3)
    assert forms.detect(ballad)[0].form == "ballad"


def test_what_is_not_seen_does_not_count_and_does_not_print():
    assert rhyme.scheme("a day\n\u200b\nto say\n\ufeff") == "A A "
    assert meter.poem("\ufeff\n\u200b").lines == (None, None)
    shown = cards.terminal("The \x1b[31mred\x1b[0m gate\x07 is shut\nand so the hut")
    assert "\x1b" not in shown and "\x07" not in shown and "The red gate is shut" in shown
    warned = forms.report("日本語 日本\nтекст\nλόγος και")
    assert "not Latin" in warned["warnings"][0] and not warned["forms"][0]["accepted"]
    assert "not Latin" in cards.terminal("日本語 日本\nтекст")


def test_report_is_plain_data():
    r = forms.report(SONNET)
    assert r["rhyme"]["scheme"] == "ABABCDCDEFEFGG" and len(r["lines"]) == 14
    assert r["forms"][0]["form"] == "Shakespearean sonnet" and r["unknown_words"]["share"] == 0
    assert "Shakespearean sonnet" in cards.terminal(SONNET) and "<table" in cards.card(SONNET)
    for row in r["lines"]:
        mark = cards.marks(row["text"], row["syllables"], row["stresses"])
        assert len(mark) == len(row["text"]) and len(mark.replace(" ", "")) == len(row["stresses"])


def test_strongly_rhyming_poems_are_selected():
    assert rhyme.strength(SONNET).strong and rhyme.strength(SONNET).perfect >= 5
    assert not rhyme.strength(LIMERICK).strong, "five lines are too few"
    assert rhyme.strength(LIMERICK, lines_min=5, perfect=2, repeats=False).strong
    assert [p for p, _ in rhyme.select_rhyming([{"content": SONNET}, {"content": PROSE}])] == [{"content": SONNET}]


@pytest.fixture
def rules_alone():
    rhyme_odds.use(None)
    yield
    rhyme_odds.use()


def test_rules_work_without_what_was_learned(rules_alone):
    assert rhyme.scheme(SONNET) == "ABABCDCDEFEFGG"
    assert rhyme.pair("love", "prove").kind == "eye/historic"
    assert meter.poem(SONNET).meter == "iambic pentameter"


def test_what_was_learned_is_small_and_helps():
    folder = root() / "poetry_iter/verse/data"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 200_000
    old = [
        "With thee I walk, and speak of love",
        "The birds are silent in the grove",
        "And nothing that I say can prove",
        "The sky is any less above",
    ]
    assert rhyme.pair(old[0], old[2]).score > 0.5, "love and prove were met in rhyme"
    assert rhyme.scheme(["a little word", "a sail", "another bird", "a tale"]) == "ABAB"


def test_the_forms_of_the_poems_that_ship():
    names = {"quatrains": "quatrain", "haiku sequence": "haiku", "tercets": "tercets", "prose lines": "free verse"}
    poems = read_jsonl(root() / "data" / "tiny_poems.jsonl")
    found = [(next((v for k, v in names.items() if p["form"].startswith(k)), p["form"]), forms.detect(p["content"])[0]) for p in poems]
    wrong = [(meant, m.form) for meant, m in found if m.form != meant]
    assert len(wrong) <= 0.1 * len(poems), wrong
    assert all(("sonnet" in m.form and m.accepted) == ("sonnet" in meant) for meant, m in found if m.form != "couplet sonnet")


@pytest.mark.parametrize("color", [False, True])
def test_a_poem_gives_the_terminal_no_orders(tmp_path, color):
    (tmp_path / "poem.txt").write_text("The moon \x1b]0;owned\x07\x1b[2J came up \x9b5m and stood\nabove the \u202ewood, and over\u2066 the wood\n")
    said = cards.verse_main(str(tmp_path / "poem.txt"), color=color)
    assert "owned" not in said and not set(re.sub(r"\x1b\[\d+m", "", said) if color else said) & set("\x1b\x9b\x07\u202e\u2066")
    assert not set(cards.verse_main(str(tmp_path / "poem.txt"), as_json=True)) & set("\x1b\x9b\u202e\u2066")


def test_what_comes_by_a_pipe_is_checked_too(monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    with pytest.raises(UserError, match="standard input: not UTF-8"):
        cards.verse_main("-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(open("/dev/zero", "rb")))
    with pytest.raises(UserError, match="standard input: more than 16,777,216 bytes"):
        cards.verse_main("-")


def test_verse_main_prints_and_refuses(tmp_path):
    (tmp_path / "poem.txt").write_text(SONNET, encoding="utf-8")
    assert "Shakespearean sonnet" in cards.verse_main(tmp_path / "poem.txt")
    assert json.loads(cards.verse_main(tmp_path / "poem.txt", True))["meter"]["name"] == "iambic pentameter"
    with pytest.raises(UserError, match="no such file"):
        cards.verse_main(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no text to analyse"):
        cards.verse_main(tmp_path / "empty.txt")


@pytest.mark.skipif(shared_data("tiny_poems.jsonl") is None, reason="needs ../shared/data/tiny_poems.jsonl")
def test_famous_poems():
    poems = read_jsonl(shared_data("tiny_poems.jsonl"))
    sonnets = [p for p in poems if "(Sonnet " in p["title"] or "Sonnet 19" in p["title"]]
    assert len(sonnets) >= 4
    for p in sonnets:
        assert "sonnet" in forms.detect(p["content"])[0].form, p["title"]
    for p in poems:
        if len(p["content"].split("\n\n")) > 2:
            best = forms.detect(p["content"])[0]
            assert not (best.accepted and "sonnet" in best.form), p["title"]
