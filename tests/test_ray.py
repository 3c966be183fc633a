"""The engine of actors: the same rows as one process, to the byte; a worker that is killed loses nothing."""

import importlib.util
import os
import signal
import threading
import time

import pytest

from poetry_iter.core import UserError, root
from poetry_iter.descriptions import describe
from poetry_iter.engine import ModelSpec, Sampling, open_engine
from poetry_iter.poems import load_poems
from poetry_iter.scoring import score

if not os.environ.get("SLOW") or importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed, or SLOW=1 is not set: pip install 'poetry_iter[ray]'", allow_module_level=True)
POEMS = load_poems(root() / "data/tiny_poems.jsonl")[0][:40]
SHORT = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def lm():
    lm = open_engine(ModelSpec(engine="ray", workers=2))
    yield lm
    lm.close()


@pytest.fixture(scope="module")
def here():
    return open_engine(ModelSpec())


def test_rows_are_those_of_one_process(lm, here):
    "Candidates and their scores, byte for byte."
    rows = describe(lm, POEMS, 4, SHORT, seed=3)
    assert rows == describe(here, POEMS, 4, SHORT, seed=3)
    whole = [{**r, "ended": "complete"} for r in rows]  # they were cut at 24 tokens, and can be scored all the same
    assert score(lm, POEMS, whole) == score(here, POEMS, whole)


def test_a_killed_worker_loses_nothing(lm, here):
    "`kill -9` in the middle of the sampling: the shard is done again."
    import ray

    pids = ray.get([w.pid.remote() for w in lm.workers])
    prompts, seen = [lm.renderer.describe(p) for p in POEMS], []
    killer = threading.Timer(1.5, lambda: (os.kill(pids[0], signal.SIGKILL), seen.append(time.monotonic())))
    killer.start()
    said = lm.sample(prompts * 3, lm.renderer.end, n=8, sampling=SHORT, seeds=list(range(120)))
    assert seen and seen[0] < time.monotonic(), "killed before the end"
    assert pids[0] not in ray.get([w.pid.remote() for w in lm.workers])
    same = here.sample(prompts * 3, lm.renderer.end, n=8, sampling=SHORT, seeds=list(range(120)))
    assert [[c.tokens for c in row] for row in said] == [[c.tokens for c in row] for row in same]


def test_what_is_refused(lm):
    with pytest.raises(UserError, match=r"is longer than the context of data/model .2048."):
        lm.sample([[5] * 3000], lm.renderer.end)
    with pytest.raises(UserError, match=r"workers is 1 or more, found 0"):
        open_engine(ModelSpec(engine="ray", workers=0))
