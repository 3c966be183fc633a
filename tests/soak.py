"""The standing test, run when asked for (`make soak`): kills at random moments over all experiments, a fuzz of poem files, the teacher's faults; one table of counts.

python tests/soak.py                                      # 200 kills, 100,000 files, every fault: some hours on two cores
python tests/soak.py --kills 12 --files 2000 --only loop  # a part of it
python tests/soak.py --folder /somewhere/soak             # kept there; stopped at any moment, the same command goes on

A run that was killed and resumed is held against two that were left alone: every row, figure and weight has the same bytes, and no file more is there. What two untouched runs do not share is not asked of a killed one.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import HOUSE, Project, kill_all, link_house, make_tiny, project_in

from poetry_iter.core import append_jsonl, read_jsonl, shared_data

CORPUS = [f"{k}={p}" for k, name in {"bad": "bad_poems.jsonl", "corpus": "verse_corpus.jsonl.gz"}.items() if (p := shared_data(name))]
SMALL = {  # experiment: settings with which it takes seconds or a minute or two
    "tiny": ["nap=1.0"],
    "judge": ["limit=20", *CORPUS, *(f'good=["{p}"]' for p in [shared_data("tiny_poems.jsonl")] if p)],
    "verse": "trees=6 stanzas=300 others=200".split(),
    "embedded": "steps=20 most=2 max_new_tokens=24".split(),
    "loop": "limit=12 num_candidates=2 top_k=1 max_iterations=1 resamples_per_iteration=2 written_poems=1 poem_tokens=24 train_batch_size=2 micro_batch_size=1".split(),
    "workshop": "limit_good=2 limit_bad=4 limit=4 limit_pairs=6 written_poems=1 poem_tokens=24 revisions=0 answer_tokens=24 lora_rank=4 interim_epochs=1 educator_epochs=1 poet_epochs=1".split(),
    "critic": "table= max_tokens=1024 epochs=1 eval_steps=4 lora_rank=4 with_reasons=false".split(),
}
SHARE = {"tiny": 15, "judge": 15, "verse": 18, "embedded": 18, "loop": 12, "workshop": 11, "critic": 11}  # of the kills: more where they take seconds
KEPT = (".jsonl", ".json", ".safetensors", ".npz")
OUTCOMES = ("same bytes", "differ", "left something behind", "ended badly")


def project_of(name: str, folder: Path) -> Project:
    """A place to work in: the small experiment's own, or the house as seen from a folder of its own."""
    if not (folder / "settings.ini").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (make_tiny if name == "tiny" else link_house)(folder)
    return project_in(folder)


def state(project: Project, run: str) -> dict[str, bytes]:
    """The files of a run, and the bytes of those that must be the same; the run's own name apart."""
    files = (p for p in project.run(run).rglob("*") if p.is_file())
    read = lambda p: p.read_bytes().replace(f"outputs/{run}".encode(), b"outputs/RUN") if p.suffix in KEPT and p.name != "config.json" else b""
    return {str(p.relative_to(project.run(run))): read(p) for p in files}


def arguments(name: str, run: str) -> list[str]:
    return ["run", name, "--run", run, *(x for s in SMALL[name] for x in ("-p", s))]


def at_work(project: Project, run: str) -> str:
    """The stage that a killed run was in."""
    running = [str(p.relative_to(project.run(run))).removesuffix(".running.ipynb") for p in project.run(run).rglob("*.running.ipynb")]
    return running[0] if running else "between stages" if project.run(run).exists() else "not begun"


class Kills:
    """The killed runs of one experiment, in a folder that remembers them."""

    def __init__(self, name: str, folder: Path, show=print):
        self.name, self.show, self.env, self.alone = name, show, {"OMP_NUM_THREADS": "1"}, []
        self.project, self.log = project_of(name, folder / name), folder / "kills.jsonl"
        self.rows = [r for r in read_jsonl(self.log, grows=True) if r["experiment"] == name]
        self.found = sum((Counter(r["counts"]) for r in self.rows), Counter())

    def note(self, run: str, counts: dict, **more) -> None:
        """A line of the log, and in the counts."""
        row = {"experiment": self.name, "run": run, "counts": counts, **more}
        append_jsonl(self.log, [row])
        self.rows.append(row)
        self.found += Counter(counts)

    def leave_alone(self) -> bool:
        """Two runs that nobody disturbs; False when they end badly."""
        alone = []
        for run in ("alone-1", "alone-2"):
            since = time.monotonic()
            done = self.project.cli(*arguments(self.name, run), env=self.env)
            if done.returncode:
                self.show(f"{self.name}: left alone it ended {done.returncode}: {done.stderr.splitlines()[-1:]}")
                self.found["ended badly"] += 1
                return False
            if not any(r["run"] == run for r in self.rows):
                self.note(run, {}, took=time.monotonic() - since)
            alone.append(state(self.project, run))
        one, two = self.alone = alone
        self.took = max(r["took"] for r in self.rows if "took" in r)
        self.same = {f for f in one if one[f] and one[f] == two.get(f)}
        self.found["files compared"], self.found["files that differ untouched"] = len(self.same), sum(bool(one[f]) and one[f] != two.get(f) for f in one)
        return True

    def kill_one(self, rng: random.Random, most: int) -> None:
        """A run, killed up to `most` times and resumed to its end."""
        begun, over = ([r["run"] for r in self.rows if r["counts"].keys() & kind] for kind in ({"runs"}, set(OUTCOMES)))
        left = [run for run in begun if run not in over]  # by a soak that was stopped
        run = left[0] if left else f"killed-{len(begun):03d}"
        if not left:
            self.note(run, {"runs": 1})
        for _ in range(most):
            process, wait = self.project.start(*arguments(self.name, run), env=self.env), rng.uniform(0.2, self.took / 2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            if process.poll() is not None:
                self.note(run, {"over before the kill": 1})
                break
            kill_all(process)
            self.note(run, {"kills": 1}, after=round(wait, 2), stage=at_work(self.project, run))
        done = self.project.cli(*arguments(self.name, run), env=self.env)
        now = state(self.project, run)
        differ = sorted(f for f in self.same if now.get(f) != self.alone[0][f])
        more = sorted(now.keys() - self.alone[0].keys() - self.alone[1].keys())
        outcome = "ended badly" if done.returncode else "differ" if differ else "left something behind" if more else "same bytes"
        said = "\n".join(done.stderr.splitlines()[-3:]) if done.returncode else differ or more
        self.note(run, {outcome: 1}, **({} if outcome == "same bytes" else {"said": said}))
        if outcome == "same bytes":
            shutil.rmtree(self.project.run(run))
        else:
            self.show(f"{self.name} {run}: {outcome}: {said}")


def kill_runs(kills: int, experiments: list[str], folder: Path, seed: int = 0, each: int = 5, show=print) -> dict[str, Counter]:
    """Runs of each experiment in turn, each killed up to `each` times and resumed, until there were so many kills; what happened how often."""
    share = sum(SHARE[n] for n in experiments)
    parts = {n: kills * SHARE[n] // share for n in experiments}
    for n in experiments[: kills - sum(parts.values())]:
        parts[n] += 1
    all_of_them = [Kills(n, folder, show) for n in experiments if parts[n]]
    rng = random.Random(f"{seed} {sum(len(k.rows) for k in all_of_them)}")
    try:
        going = list(all_of_them)
        while going := [k for k in going if k.found["kills"] < parts[k.name]]:
            k = min(going, key=lambda k: k.found["kills"] / parts[k.name])
            if k.alone or k.leave_alone():
                k.kill_one(rng, min(each, parts[k.name] - k.found["kills"]))
            else:
                going.remove(k)
    finally:
        for k in all_of_them:
            k.project.end()
    return {f"kills: {k.name}": k.found for k in all_of_them}


def fuzz_poems(files: int, show=print) -> Counter:
    """Poem files of every kind of nonsense: poems, or one sentence."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from poetry_iter.core import UserError
    from poetry_iter.poems import load_poems

    found = Counter()
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    keys = st.sampled_from(["title", "content", "author", "text", "poem", "id", "extra", "source"]) | st.text(max_size=6)
    rows = (
        st.dictionaries(keys, values, max_size=5) | st.fixed_dictionaries({"title": st.text(max_size=30), "content": st.text(max_size=200)}) | values
    )
    lines = st.lists(rows.map(lambda row: json.dumps(row, ensure_ascii=bool(len(str(row)) % 2))), max_size=5).map(
        lambda found: "\n".join(found).encode("utf-8", "surrogatepass")
    )
    whole = rows.map(lambda row: json.dumps([row, row]).encode("utf-8", "surrogatepass"))
    text = st.text(max_size=400).map(lambda t: t.encode("utf-8", "surrogatepass"))
    cut = st.builds(lambda data, n: data[: n % (len(data) + 1)], lines, st.integers(0, 10**6))
    suffixes = st.sampled_from([".jsonl", ".jsonl", ".json", ".txt", ".csv", ".tsv"])

    with tempfile.TemporaryDirectory() as folder:

        @settings(max_examples=files, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(data=lines | whole | text | cut | st.binary(max_size=300), suffix=suffixes, strict=st.booleans())
        def read(data, suffix, strict):
            path = Path(folder) / f"poems{suffix}"
            path.write_bytes(data)
            found["files"] += 1
            try:
                poems, _ = load_poems(path, strict=strict)
                found["with poems" if poems else "all dropped"] += 1
                assert all(p.title.strip() and p.content.strip() for p in poems)
                json.dumps([p.row() for p in poems], allow_nan=False).encode()
            except UserError as e:
                assert str(e).count("\n") == 0
                found["refused in a sentence"] += 1
            except Exception as e:
                found["failed"] += 1
                if found["failed"] < 20:
                    show(f"poem file {suffix} {data[:120]!r}: {type(e).__name__}: {str(e)[:200]}")

        read()
    return found


def teacher_faults(short: bool, show=print) -> Counter:
    """The faults of the teaching service, where that test is there."""
    if not (HOUSE / "tests/soak_teacher.py").exists():
        return Counter()
    done = subprocess.run(
        [sys.executable, HOUSE / "tests/soak_teacher.py", *(["--short"] if short else [])], cwd=HOUSE, capture_output=True, text=True
    )
    show(done.stdout)
    return Counter({"passed": 1} if done.returncode == 0 else {"failed": 1})


def soak(kills: int, files: int, experiments: list[str], folder: Path, seed: int = 0, teacher: str = "", show=print) -> pd.DataFrame:
    """All of it; a row for each part. A column that is not 0 where it should be makes `faults`."""
    rows = kill_runs(kills, experiments, folder, seed, show=show) if kills else {}
    if files:
        rows["poem files"] = fuzz_poems(files, show)
    if teacher:
        rows["teacher"] = teacher_faults(teacher == "short", show)
    table = pd.DataFrame(rows).T.fillna(0).astype(int)
    bad = [c for c in (*OUTCOMES[1:], "failed") if c in table]
    table["faults"] = table[bad].sum(axis=1) if bad else 0
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="over all experiments (default: %(default)s)")
    parser.add_argument("--files", type=int, default=100_000, help="poem files of the fuzz (default: %(default)s)")
    parser.add_argument("--only", default=",".join(SMALL), help="experiments, separated by commas (default: %(default)s)")
    parser.add_argument("--teacher", choices=["no", "short", "full"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs and the log of kills lie, to go on there (default: one that is taken away)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started ends with it
    since = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = (args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(HOUSE)
        table = soak(args.kills, args.files, args.only.split(","), folder, args.seed, "" if args.teacher == "no" else args.teacher)
    columns = [c for c in table if c != "faults"]
    for name, row in table.iterrows():
        print(f"{name:<18} " + ", ".join(f"{row[c]:,} {c}" for c in columns if row[c]) + f"; faults: {row.faults}")
    print(f"{(time.monotonic() - since) / 60:.0f} minutes")
    return int(table.faults.sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
