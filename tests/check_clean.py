"""Do the notebooks and the package agree? `nbdev_export` and `nbdev_clean` run on a copy of both; what they change there is named here."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Path under the root → content."""
    return {str(f.relative_to(folder)): f.read_bytes() for p in patterns for f in sorted(folder.glob(p))}


def copy(folder: Path) -> None:
    """What the two commands read and write."""
    skip = shutil.ignore_patterns(".*", "_proc", "__pycache__", "*.running.ipynb", "*.failed.ipynb")
    for name in ("nbs", "poetry_iter"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "settings.ini", folder)


def changed(command: str, folder: Path, *patterns: str) -> list[str]:
    """The files that a command of nbdev changes, adds or removes in the folder."""
    before = contents(folder, *patterns)
    done = subprocess.run([BIN / command], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} fails:\n{done.stdout}{done.stderr}")
    after = contents(folder, *patterns)
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def orphans(folder: Path) -> list[str]:
    """Modules whose notebook is gone."""
    found = []
    for f in sorted((folder / "poetry_iter").rglob("*.py")):
        _, mark, source = f.read_text(encoding="utf-8").partition("File to edit: ")
        if mark and not (f.parent / source.split("\n")[0].rstrip(". ")).exists():
            found.append(str(f.relative_to(folder)))
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy(folder)
        faults = [f"{f}: its notebook is gone; remove it" for f in orphans(folder)]
        faults += [
            f"{f}: not what its notebook exports; run nbdev_export (a module is never edited by hand)"
            for f in changed("nbdev_export", folder, "poetry_iter/**/*.py")
        ]
        faults += [f"{f}: not clean; run nbdev_clean" for f in changed("nbdev_clean", folder, "nbs/**/*.ipynb")]
    print("\n".join(faults) or "the notebooks are clean and the package is what they export")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
