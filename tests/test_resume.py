"""Exact resume: the loop, killed in its phases and resumed, leaves the bytes of a run that was left alone."""

import json
import os

import pytest
from conftest import HOUSE, kill_all, wait_for

PHASES = [  # round, stage, what is there when it is killed; half of them but for SLOW=1
    ("round_001", "2_describe", "candidates.jsonl"),  # its answers, perhaps not yet its metrics
    ("round_001", "3_score", "3_score.running.ipynb"),  # no more than a kernel
    ("round_002", "4_select", "ledger.jsonl"),  # perhaps its winners
    ("round_002", "5_train", "checkpoint.work/checkpoint-1/trainer_state.json"),  # one step of two
][slice(None) if os.environ.get("SLOW") else slice(0, None, 3)]
SETTINGS = dict(
    num_candidates=2,
    top_k=1,
    learn="write",
    max_iterations=1,
    resamples_per_iteration=2,
    held_out=0.2,
    written_poems=1,
    poem_tokens=24,
    description_tokens=64,
    train_batch_size=1,
    micro_batch_size=1,
    on_collapse="continue",
)


@pytest.fixture
def arguments(house):
    rows = (HOUSE / "data/tiny_poems.jsonl").read_text().splitlines(keepends=True)
    path = house.path / "poems.jsonl"
    path.write_text("".join(sorted(rows, key=lambda row: len(json.loads(row)["content"]))[:6]))
    return [x for k, v in {**SETTINGS, "poems": path}.items() for x in ("-p", f"{k}={v}")]


def test_a_loop_killed_in_its_phases_is_the_loop_left_alone(house, arguments):
    one = {"env": {"OMP_NUM_THREADS": "1"}}
    alone = house.start("run", "loop", "--run", "alone", *arguments, **one)
    command = ["run", "loop", "--run", "killed", *arguments]
    for folder, stage, sign in PHASES:
        process = house.start(*command, **one)
        wait_for(house.run("killed") / folder / sign, process)
        kill_all(process)
        left = house.notebooks("killed")
        assert f"{folder}/{stage}.running.ipynb" in left and f"{folder}/{stage}.ipynb" not in left, f"{stage} was over before the kill"
        command = ["run", "loop", "--resume", "--run", "killed"]
    done = house.cli(*command, **one)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("outputs/killed/report.html\n") and (house.run("killed") / "report.html").stat().st_size > 10_000
    _, err = alone.communicate()
    assert alone.returncode == 0, err

    names = sorted(str(f.relative_to(house.run("alone"))) for f in house.run("alone").rglob("*.jsonl"))
    assert {"metrics.jsonl", "round_001/winners.jsonl", "round_002/winners.jsonl"} <= set(names)
    assert names == sorted(str(f.relative_to(house.run("killed"))) for f in house.run("killed").rglob("*.jsonl"))
    for name in names:  # metrics, checkpoints, candidates, scores, ledgers, winners …
        assert (house.run("killed") / name).read_bytes() == (house.run("alone") / name).read_bytes(), f"{name} differs"
    for weights in ("round_001", "round_002"):
        a, b = (house.run(run) / weights / "checkpoint/adapter_model.safetensors" for run in ("alone", "killed"))
        assert a.read_bytes() == b.read_bytes(), f"the weights of {weights} differ"
