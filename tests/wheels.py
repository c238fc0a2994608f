"""Wheels of the library, and environments that have it from a wheel."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    """Returns the wheel of the library, built in `folder` from a copy: a build leaves folders behind in its source."""
    source = folder / "source"
    for room in ("conf", "hydra_plugins", "lq_plugin", "tests"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".", cwd=source)
    (path,) = folder.glob("*.whl")
    return path


def install_alone(wheel: Path, folder: Path) -> Path:
    """Returns the folder of the commands of a new environment: this one's packages, and the library from a wheel."""
    venv.create(folder)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    packages = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    # Files of paths in these folders are not read again, so that an editable library does not come with them.
    Path(paths["purelib"], "packages.pth").write_text("\n".join(packages))
    _pip("--python", Path(paths["scripts"], "python"), "install", "--no-deps", wheel)
    return Path(paths["scripts"])


def _pip(*arguments: object, cwd: Path | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
