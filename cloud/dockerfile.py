"""cloud/Dockerfile from settings.ini: `make dockerfile`; with --check nothing is written, and exit status 1 says that it is stale."""

import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = """\
# made from settings.ini by `make dockerfile`: edit cloud/dockerfile.py
#   docker build -f cloud/Dockerfile --target cpu -t {name}:cpu .      (--build-arg TORCH_INDEX=ADDRESS of torch's CPU builds saves several GB)
#   docker build -f cloud/Dockerfile --target cuda -t {name}:cuda .
#   docker run --rm -v "$PWD/outputs:/app/outputs" {name}:cpu run loop
#   docker run --rm --gpus all -v "$PWD/outputs:/app/outputs" -v "$PWD/poems:/app/poems" -e HF_TOKEN {name}:cuda run loop --profile qwen3-8b-qlora -p poems=poems/mine.jsonl

FROM python:{python}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
RUN pip install "setuptools<81" wheel

FROM base AS cpu
ARG TORCH_INDEX=
RUN pip install ${{TORCH_INDEX:+--index-url "$TORCH_INDEX"}} {torch}
RUN pip install {requirements}
COPY . /{name}
RUN pip install --no-deps --no-build-isolation -e /{name}
WORKDIR /app
ENTRYPOINT ["{command}"]
CMD ["check"]

# triton compiles kernels while it runs, so a compiler stays in the image
FROM base AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install {torch}
RUN pip install {requirements} bitsandbytes==0.50.2
RUN pip install --no-deps {unsloth}
COPY . /{name}
RUN pip install --no-deps --no-build-isolation -e /{name}
ENV UNSLOTH_AUTO_INSTALL=0
WORKDIR /app
ENTRYPOINT ["{command}"]
CMD ["check"]
"""


def dockerfile() -> str:
    "The text of the Dockerfile."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = config["DEFAULT"]
    torch, *others = sorted(cfg["requirements"].split(), key=lambda r: not r.startswith("torch~"))
    quoted = lambda names: " ".join(map(shlex.quote, names))
    return TEXT.format(name=cfg["lib_name"], python=cfg["min_python"], torch=shlex.quote(torch), requirements=quoted(others), unsloth=quoted(cfg["unsloth_requirements"].split()),
                       command=cfg["console_scripts"].partition("=")[0])


if __name__ == "__main__":
    path = ROOT / "cloud" / "Dockerfile"
    if "--check" in sys.argv: sys.exit(0 if path.is_file() and path.read_text(encoding="utf-8") == dockerfile() else f"{path}: stale; run `make dockerfile`")
    path.write_text(dockerfile(), encoding="utf-8")
