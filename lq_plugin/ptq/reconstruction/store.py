"""Reconstructed units on disk, so that a run which was killed goes on after them with the same result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from lq_plugin.errors import CalibrationError
from lq_plugin.model.digest import digest
from lq_plugin.model.ranks import gathered, is_first
from lq_plugin.ptq.reconstruction.learn import UnitResult
from lq_plugin.utilities.files import make_folder, write_file

_RUN = "run.json"


class UnitStore:
    """One file for each unit in a folder. Of several processes the first one writes, all of them read.

    Args:
        folder: made when it is not there.
        run: what the result depends on, as plain text by topic: only units of an equal run are taken up.

    Raises:
        CalibrationError: the folder holds units of another run; it says what differs.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, str]) -> None:
        self.folder = make_folder(folder, CalibrationError)
        self.writes = is_first()
        path = self.folder / _RUN
        if path.exists():
            try:
                known = json.loads(path.read_text())
            except ValueError as error:
                raise CalibrationError(f"{path} is not the record of a reconstruction: {error}") from error
            differing = [key for key in sorted({*known, *run}) if known.get(key) != run.get(key)]
            if differing:
                raise CalibrationError(
                    f"{self.folder} holds units that were reconstructed with other {', '.join(differing)}: "
                    "choose another folder, or delete this one"
                )
        elif self.writes:
            write_file(path, json.dumps(dict(run), indent=1), CalibrationError)

    def load(self, index: int, unit: str, modules: Mapping[str, nn.Module]) -> UnitResult | None:
        """Gives modules what a unit has learned; None when not every process finds it in the folder.

        Args:
            index, unit: number and name of the unit.
            modules: that learning the unit changes, by name.

        Raises:
            CalibrationError: a file that is damaged, or of another unit.
        """
        path = self._path(index)
        if not all(gathered(path.exists())):
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            result = UnitResult(**json.loads(metadata["fit"]))
            # Units of earlier versions have no checksum.
            if metadata.get("checksum", _checksum(state, metadata)) != _checksum(state, metadata):
                raise ValueError("its checksum does not fit its content")
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is not a reconstructed unit: {error}") from error
        if metadata.get("unit") != unit:
            raise CalibrationError(f"{path} is of unit {metadata.get('unit')!r}, not of {unit!r}")
        for name, module in modules.items():
            mine = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            try:
                module.load_state_dict(mine)
            except RuntimeError as error:
                raise CalibrationError(f"{path} does not fit {name}: {error}") from error
        return result

    def save(self, index: int, unit: str, modules: Mapping[str, nn.Module], result: UnitResult) -> None:
        """Keeps what modules have learned; the file appears when it is whole.

        Args:
            index, unit: number and name of the unit.
            modules: that learning the unit has changed, by name.
            result: of its optimization.
        """
        if self.writes:
            state = {
                f"{name}/{key}": value.detach().cpu().clone()
                for name, module in modules.items()
                for key, value in module.state_dict().items()
            }
            metadata = {"unit": unit, "fit": json.dumps(asdict(result))}
            metadata["checksum"] = _checksum(state, metadata)
            write_file(self._path(index), save(state, metadata), CalibrationError)

    def _path(self, index: int) -> Path:
        return self.folder / f"unit_{index:04d}.safetensors"


def _checksum(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return digest([(f"{metadata['unit']} {metadata['fit']}", torch.empty(0)), *sorted(state.items())])
