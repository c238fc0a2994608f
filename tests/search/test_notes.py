"""Notes and artifacts of a search, read back by optuna-dashboard and Optuna."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import yaml
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.search import SearchConfig, search
from lq_plugin.search.study.dashboard import FOLDER

from .conftest import CPU

SPACE = {"weight": {"bit_widths": [2, 8], "ranges": ["minmax"]}}


def test_trials_have_a_note_and_their_plan(model: DigitsCNN, tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard")
    result = search(
        model, DigitsDataModule(batch_size=120), SPACE, "val/acc", 4, study_name="noted", output_dir=tmp_path, seeds=1,
        trainer=CPU, calibration_batches=1, progress=False, dashboard=True,
    )  # fmt: skip
    study = optuna.load_study(study_name="noted", storage=f"sqlite:///{tmp_path / 'study.db'}")
    attrs = study._storage.get_study_system_attrs(study._study_id)
    store = FileSystemArtifactStore(tmp_path / FOLDER)
    for candidate in result.candidates:
        trial = study.trials[candidate.number]
        # As the dashboard's own server reads it.
        note = dashboard._note.get_note_from_system_attrs(attrs, trial._trial_id)["body"]
        assert f"val/acc {candidate.metric:.5g}, effective_bits {candidate.effective_bits:.5g}" in note
        for rule in candidate.plan.rules:
            assert f"| {rule.match} | {rule.weight} |" in note
        (artifact,) = get_all_artifact_meta(trial, storage=study._storage)
        with store.open_reader(artifact.artifact_id) as stream:
            assert QuantPlan.from_dict(yaml.safe_load(stream.read())) == candidate.plan
        assert artifact.filename == f"plan_{candidate.number:03d}.yaml"
    assert "from sensitivity" in "".join(str(value) for value in attrs.values())
    assert dashboard.get_note(study).startswith(f"Best: trial {result.best().number}, val/acc")
    (page,) = get_all_artifact_meta(study)
    with store.open_reader(page.artifact_id) as stream:
        assert stream.read() == (tmp_path / "report.html").read_bytes()


def test_a_dashboard_needs_a_folder_and_a_word(model: DigitsCNN) -> None:
    for wrong, said in (({"dashboard": True}, "needs output_dir"), ({"dashboard": "yes"}, "True or False, got 'yes'")):
        with pytest.raises(QuantizationError, match=said):
            SearchConfig(model, None, SPACE, "val/acc", **wrong)  # type: ignore[arg-type]
