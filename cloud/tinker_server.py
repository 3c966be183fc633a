"""An open Tinker server on this machine: skyrl with its JAX backend, on the CPU, for one model.

    .tinker-venv/bin/python cloud/tinker_server.py --base-model data/model --port 8765

Takes what `python -m skyrl.tinker.api` takes; `make tinker-server` makes the environment and starts it.
Three things are set right here. skyrl starts its engine by `uv run`, which would resolve an environment
anew. On Python 3.11 its types need typing_extensions' TypedDict. And it compiles for each length of a
sequence, up to a minute each on one core: lengths are rounded up to powers of two here, and what was
compiled is kept.
"""

import argparse
import json
import os
import runpy
import sys
import typing
from pathlib import Path

import typing_extensions

ENGINE = "skyrl.tinker.engine"
HOME = Path("outputs/tinker").resolve()  # checkpoints, the table of requests, what was compiled
DEFAULTS = {"base_model": "data/model", "backend": "jax", "checkpoints_base": str(HOME / "checkpoints"), "database_url": f"sqlite:///{HOME / 'requests.db'}",
            "backend_config": json.dumps({"max_lora_adapters": 16, "train_micro_batch_size": 8, "sample_max_num_sequences": 16})}


def run_engine() -> None:
    """skyrl's engine, which loads the model."""
    from skyrl.tx.utils import models

    models.round_up_seq_len = lambda n: max(256, 1 << (n - 1).bit_length())
    runpy.run_module(ENGINE, run_name="__main__")


def serve() -> None:
    """skyrl's server, whose engine runs in the environment of this interpreter."""
    import uvicorn
    from skyrl.tinker import api

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    api.add_model(parser, api.EngineConfig)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765)
    for action in parser._actions:
        if action.dest in DEFAULTS: action.default, action.required = DEFAULTS[action.dest], False
    args = vars(parser.parse_args())
    api._build_uv_run_cmd_engine = lambda parent, config: [sys.executable, __file__, ENGINE, *api.config_to_argv(config)]
    api.app.state.engine_config = api.EngineConfig.model_validate({k: v for k, v in args.items() if k in api.EngineConfig.model_fields})
    uvicorn.run(api.app, host=args["host"], port=args["port"], log_level="warning")


if __name__ == "__main__":
    if sys.version_info < (3, 12): typing.TypedDict = typing_extensions.TypedDict
    HOME.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HOME / "compiled"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if sys.argv[1:2] == [ENGINE]: sys.argv.pop(1); run_engine()
    else: serve()
