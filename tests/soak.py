"""The standing test, run when asked for (`make soak`): kills at random moments over all experiments, a fuzz of poem files, the teacher's faults; one table of counts.

python tests/soak.py                                      # 200 kills, 100,000 files, every fault: some hours on two cores
python tests/soak.py --kills 12 --files 2000 --only loop  # a part of it

A run that was killed and resumed is held against two that were left alone: every row of every .jsonl and every weight has the same bytes. What two untouched runs do not share is not asked of a killed one.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import HOUSE, Project, kill_all, link_house, make_tiny, project_in

SMALL = {  # experiment: settings with which it takes a minute or two
    "tiny": ["nap=1.0"],
    "loop": "limit=12 num_candidates=2 top_k=1 max_iterations=1 resamples_per_iteration=2 written_poems=1 poem_tokens=24 train_batch_size=2 micro_batch_size=1".split(),
    "workshop": "limit_good=2 limit_bad=4 limit=4 limit_pairs=6 written_poems=1 poem_tokens=24 revisions=0 answer_tokens=24 lora_rank=4 interim_epochs=1 educator_epochs=1 poet_epochs=1".split(),
    "embedded": "steps=20 most=2 max_new_tokens=24".split(),
    "verse": "trees=6 stanzas=300 others=200".split(),
}
KEPT = (".jsonl", ".safetensors")


def project_of(name: str, folder: Path) -> Project:
    """A place to work in: the small experiment's own, or the house as seen from a folder of its own."""
    (make_tiny if name == "tiny" else link_house)(folder)
    return project_in(folder)


def state(project: Project, run: str) -> dict[str, bytes]:
    """The files that must have the same bytes; the run's own name apart."""
    files = (p for p in project.run(run).rglob("*") if p.suffix in KEPT and p.is_file())
    return {str(p.relative_to(project.run(run))): p.read_bytes().replace(f"outputs/{run}".encode(), b"outputs/RUN") for p in files}


def arguments(name: str, run: str) -> list[str]:
    return ["run", name, "--run", run, *(x for s in SMALL[name] for x in ("-p", s))]


def kill_runs(name: str, kills: int, rng: random.Random, each: int = 4, show=print) -> Counter:
    """Runs of an experiment, each killed up to `each` times and resumed to its end; how often what happened."""
    found = Counter()
    with tempfile.TemporaryDirectory() as folder:
        project, env = project_of(name, Path(folder)), {"OMP_NUM_THREADS": "1"}
        alone, since = [], time.monotonic()
        for run in ("alone-1", "alone-2"):
            done = project.cli(*arguments(name, run), env=env)
            if done.returncode:
                show(f"{name}: left alone it ended {done.returncode}: {done.stderr.splitlines()[-1:]}")
                return found + Counter({"ended badly": 1})
            alone.append(state(project, run))
        took = (time.monotonic() - since) / 2
        same = {f for f in alone[0] if alone[0][f] == alone[1].get(f)}
        found["files compared"] = len(same)
        found["files that differ untouched"] = len(alone[0]) - len(same)
        while found["kills"] < kills:
            run = f"killed-{found['runs']:03d}"
            found["runs"] += 1
            for _ in range(min(each, kills - found["kills"])):
                process = project.start(*arguments(name, run), env=env)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0.2, took))
                if process.poll() is not None:
                    found["over before the kill"] += 1
                    break
                kill_all(process)
                found["kills"] += 1
            done = project.cli(*arguments(name, run), env=env)
            now = state(project, run)
            differ = sorted(f for f in same if now.get(f) != alone[0][f])
            stale = [p for p in project.run(run).rglob("*") if p.name.endswith((".running.ipynb", ".lock", ".tmp"))]
            outcome = "ended badly" if done.returncode else "differ" if differ else "left something behind" if stale else "same bytes"
            found[outcome] += 1
            if outcome != "same bytes":
                show(f"{name} {run}: {outcome}: {done.stderr.splitlines()[-1:] if done.returncode else differ or stale}")
        project.end()
    return found


def fuzz_poems(files: int, show=print) -> Counter:
    """Poem files of every kind of nonsense: poems, or one sentence."""
    import json

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


def soak(kills: int, files: int, experiments: list[str], seed: int = 0, teacher: str = "", show=print) -> pd.DataFrame:
    """All of it; a row for each part. A column that is not 0 where it should be makes `faults`."""
    rng, rows = random.Random(seed), {}
    for n, name in enumerate(experiments if kills else []):
        part = kills // len(experiments) + (n < kills % len(experiments))
        if part:
            rows[f"kills: {name}"] = kill_runs(name, part, rng, show=show)
    if files:
        rows["poem files"] = fuzz_poems(files, show)
    if teacher:
        rows["teacher"] = teacher_faults(teacher == "short", show)
    table = pd.DataFrame(rows).T.fillna(0).astype(int)
    bad = [c for c in ("ended badly", "differ", "left something behind", "failed") if c in table]
    table["faults"] = table[bad].sum(axis=1) if bad else 0
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="over all experiments (default: %(default)s)")
    parser.add_argument("--files", type=int, default=100_000, help="poem files of the fuzz (default: %(default)s)")
    parser.add_argument("--only", default=",".join(SMALL), help="experiments, separated by commas (default: %(default)s)")
    parser.add_argument("--teacher", choices=["no", "short", "full"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(HOUSE)
    since = time.monotonic()
    table = soak(args.kills, args.files, args.only.split(","), args.seed, "" if args.teacher == "no" else args.teacher)
    columns = [c for c in table if c != "faults"]
    for name, row in table.iterrows():
        print(f"{name:<18} " + ", ".join(f"{row[c]:,} {c}" for c in columns if row[c]) + f"; faults: {row.faults}")
    print(f"{(time.monotonic() - since) / 60:.0f} minutes")
    return int(table.faults.sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
