"""Training in two processes under `accelerate launch` (gloo, on the CPU): the losses of one process."""

import os
import time

import pytest

from poetry_iter.core import UserError, read_json, root
from poetry_iter.engine import ModelSpec, open_engine, open_renderer
from poetry_iter.poems import load_poems
from poetry_iter.training import Training, train

SETTINGS = {"learning_rate": 1e-3, "learning_rate_end": 5e-4, "batch_size": 4, "micro_batch_size": 2, "lora_rank": 4, "saves": 1, "seed": 3}


@pytest.fixture(scope="module")
def examples():
    poems = sorted(load_poems(root() / "data/tiny_poems.jsonl")[0], key=lambda p: len(p.content))[:14]  # the last batch has two of four
    renderer = open_renderer(ModelSpec())[0]
    return [renderer.example("Salt and light.", p.title, p.content) for p in poems]


def test_a_batch_is_dealt_to_all():
    with pytest.raises(UserError, match="a batch of 4 examples cannot be dealt to 3 processes"):
        Training(**SETTINGS, processes=3)


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="two processes import torch: SLOW=1")
def test_two_processes_train_as_one(tmp_path, examples):
    "Four steps, the last on half a batch, and a second round on top of the first."
    seconds = {}
    for n in (1, 2):
        lm, start = open_engine(ModelSpec()), time.process_time()
        one = train(lm, examples, tmp_path / f"one_{n}", Training(**SETTINGS, processes=n), total_steps=8)
        again = open_engine(ModelSpec().on(tmp_path / f"one_{n}"))
        two = train(
            again, examples[::-1], tmp_path / f"two_{n}", Training(**SETTINGS, processes=n), total_steps=8, previous=str(tmp_path / f"one_{n}")
        )
        seconds[n] = (one, two, again.token_losses(examples), time.process_time() - start)
    for a, b in zip(seconds[1][:2], seconds[2][:2]):
        print(a["losses"], b["losses"])
        assert len(a["losses"]) == 4 and a["learning_rates"] == b["learning_rates"]
        assert max(abs(x - y) for x, y in zip(a["losses"], b["losses"])) < 1e-4
    assert max(abs(x - y).max() for x, y in zip(seconds[1][2], seconds[2][2])) < 1e-2
    assert read_json(tmp_path / "two_2/made_with.json")["step"] == 8
    assert (tmp_path / "two_2/rng_state_1.pth").exists() and not (tmp_path / "two_1/rng_state_1.pth").exists()  # of the second process
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one_1", "one_2", "two_1", "two_2"]  # no job, no half a folder
