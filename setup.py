"""Everything is read from settings.ini; the wheel carries what a run reads."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="], interpolation=None)
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}


def shared_files() -> list[Path]:
    """The experiments with their profiles, the poems, the model, the kept runs: what `poetry_iter.core.house` looks for in `poetry_iter/share`."""
    folders = [*(p.parent for p in sorted(Path("nbs").glob("*/experiment.yaml"))), Path("nbs/explore"), Path("data"), Path("outputs/reference")]
    unwanted = (".ipynb_checkpoints", "__pycache__")
    return [f for folder in folders for f in sorted(folder.rglob("*")) if f.is_file() and not set(f.parts) & set(unwanted) and ".running." not in f.name]


class BuildWithShare(build_py):
    """Copies them beside the modules; an editable install finds them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in shared_files():
                place = Path(self.build_lib) / "poetry_iter/share" / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    license="MIT",
    author=cfg["author"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["poetry_iter", "poetry_iter.*"]),
    package_data={"poetry_iter": ["py.typed", "*/data/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    cmdclass={"build_py": BuildWithShare},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    zip_safe=False,
)
