"""Any experiment on a GPU of Modal's: poems go up, the run's folder comes back, GGUF files with it.

    pip install modal && modal setup
    modal secret create huggingface HF_TOKEN=…      (once; an empty value will do for models that are not gated)
    modal run cloud/modal_app.py --run qwen --profile qwen3-8b-qlora --poems poems/mine.jsonl
    GPU=H100 modal run cloud/modal_app.py --experiment workshop --profile qwen2.5-7b-qlora --run shop --then "export --help"

A run that was cut off goes on when the same line is given again: its folder lies in the volume `poetry-iter`.
"""

import os
import shlex
import subprocess
from pathlib import Path, PurePosixPath

import modal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = "/app"  # in the container: where a run is written
GPU = os.environ.get("GPU", "L40S")
HOURS = 24

volume = modal.Volume.from_name("poetry-iter", create_if_missing=True)
cache = modal.Volume.from_name("poetry-iter-hub", create_if_missing=True)  # models of the hub, fetched once
image = modal.Image.from_dockerfile(HERE / "Dockerfile", context_dir=ROOT, ignore=(HERE / "Dockerfile.dockerignore").read_text().splitlines()[1:]).entrypoint([]) if modal.is_local() else modal.Image.debian_slim()
app = modal.App("poetry-iter", image=image)


def command_lines(experiment: str, profile: str, run: str, poems: str, settings: str, then: str) -> list[list[str]]:
    "What is called in the container, one after the other."
    first = ["poetry-iter", "run", experiment, "--run", run]
    first += ["--profile", profile] if profile else []
    first += ["-p", f"poems=poems/{PurePosixPath(poems).name}"] if poems else []
    for setting in shlex.split(settings): first += ["-p", setting]
    return [first, *(["poetry-iter", *shlex.split(more)] for more in then.split(";") if more.strip())]


@app.function(gpu=GPU, timeout=HOURS * 3600, volumes={WORK: volume, "/root/.cache/huggingface": cache}, secrets=[modal.Secret.from_name("huggingface", required_keys=["HF_TOKEN"])], retries=2)
def work(lines: list[list[str]]) -> None:
    "Call the lines in the volume; what they wrote is kept whatever becomes of them."
    try:
        for line in lines: subprocess.run(line, cwd=WORK, check=True)
    finally: volume.commit()


def fetch(run: str) -> list[Path]:
    "Bring a run's folder home, and the GGUF files beside it."
    found = []
    for entry in volume.listdir("outputs", recursive=True):
        path = PurePosixPath(entry.path)
        mine = PurePosixPath("outputs", run) in path.parents or path.suffix == ".gguf"
        if entry.type != modal.volume.FileEntryType.FILE or not mine: continue
        target = ROOT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as f: volume.read_file_into_fileobj(str(path), f)
        found.append(target)
    return found


@app.local_entrypoint()
def main(experiment: str = "loop", profile: str = "", run: str = "", poems: str = "", settings: str = "", then: str = ""):
    "Poems up, the work, the run back. `settings`: name=value with blanks between; `then`: more commands of poetry-iter, with ; between."
    if not run: raise SystemExit("modal_app: say --run NAME; the same name goes on with the same run")
    if poems:
        if not Path(poems).is_file(): raise SystemExit(f"modal_app: {poems}: there is no such file")
        with volume.batch_upload(force=True) as batch: batch.put_file(poems, f"/poems/{Path(poems).name}")
    try: work.remote(command_lines(experiment, profile, run, poems, settings, then))
    finally: files = fetch(run)
    print(f"{len(files)} files in {ROOT / 'outputs' / run}")
