"""Virtual environments of the peers, in `benchmarks/.cache/peers`: their dependencies conflict with ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".cache" / "peers"
#: Installed first, so that nothing else chooses a build of it.
TORCH = "torch==2.13.0"
#: What loads the data and the model.
SHARED = ("lightning", "numpy", "pillow", "pyarrow", "safetensors")


@dataclass(frozen=True)
class Peer:
    """A peer's packages, and what its rows say.

    Attributes:
        requirements: what pip installs next to torch and `SHARED`.
        rounding: name of its rows.
        default_iterations: what it does a layer unless told otherwise, below 8 bits; 0: it is no peer of accuracies.
        range: how it finds the ranges of weights.
        input_range: how it finds those of activations.
    """

    requirements: tuple[str, ...]
    rounding: str
    default_iterations: int
    range: str
    input_range: str


PEERS = {
    "aimet": Peer(("aimet-torch==2.42.0", "torchvision"), "aimet adaround", 15_000, "tf_enhanced", "tf_enhanced"),
    "llmcompressor": Peer(("llmcompressor==0.14.0.1", "rich"), "llm-compressor gptq", 0, "minmax", "none"),
    # The second two are imported by the first and are no requirements of it.
    "modelopt": Peer(
        ("nvidia-modelopt==0.47.0", "requests", "huggingface_hub"), "modelopt auto_quantize", 0, "max", "max"
    ),
    "brevitas": Peer(
        ("brevitas==0.13.4", "accelerate", "tqdm"), "brevitas learned round", 1_000, "max", "percentile_99.999"
    ),
}


class PeerError(RuntimeError):
    """A peer that is not installed, cannot be installed, or failed."""


def python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return FOLDER / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_installed(name: str) -> bool:
    """True when the environment is complete and holds the versions that this file names."""
    ready = FOLDER / name / "installed.txt"
    return ready.is_file() and ready.read_text(encoding="utf-8") == _requirements(name)


def require(names: Iterable[str]) -> None:
    """Refuse peers that are not installed.

    Raises:
        PeerError: naming all of them and the command that installs them.
    """
    if missing := [name for name in names if not is_installed(name)]:
        verb = "is" if len(missing) == 1 else "are"
        raise PeerError(
            f"{' and '.join(missing)} {verb} not installed; run\n    python -m benchmarks.peers install "
            f"{' '.join(missing)}"
        )


def install(name: str, torch: str = TORCH) -> None:
    """Make a peer's environment with pip; what is there already is kept.

    Args:
        name: a key of `PEERS`.
        torch: requirement of torch. It is installed alone, and then held: some index may offer newer builds with
            gigabytes of CUDA packages.

    Raises:
        PeerError: when a step fails; pip's own words are on the terminal.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    _call(name, [sys.executable, "-m", "venv", str(FOLDER / name)])
    pip = [str(python(name)), "-m", "pip", "install", "--disable-pip-version-check"]
    _call(name, [*pip, torch])
    installed = subprocess.run(
        [str(python(name)), "-c", "from importlib.metadata import version; print(version('torch'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    constraints = FOLDER / name / "constraints.txt"
    constraints.write_text(f"torch=={installed}\n", encoding="utf-8")
    _call(name, [*pip, "--constraint", str(constraints), *_requirements(name).split()])
    (FOLDER / name / "installed.txt").write_text(_requirements(name), encoding="utf-8")


def _requirements(name: str) -> str:
    return "\n".join((*PEERS[name].requirements, *SHARED)) + "\n"


def _call(name: str, command: list[str]) -> None:
    if code := subprocess.run(command).returncode:
        raise PeerError(f"{name} was not installed: {' '.join(command)} failed with exit code {code}")
