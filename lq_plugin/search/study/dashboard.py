"""Notes and artifacts for optuna-dashboard: of a trial its plan, of a study its page.

optuna-dashboard sqlite:///runs/search/study.db --artifact-dir runs/search/artifacts
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optuna import Study, Trial
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.report.origins import told
from lq_plugin.search.shared.database import quiet
from lq_plugin.search.study.candidates import StudyCandidates
from lq_plugin.search.study.objective import ORIGIN
from lq_plugin.utilities.files import make_folder, temporary_folder

#: Folder of the artifacts, in the folder of the search.
FOLDER = "artifacts"


class Dashboard:
    """Writes what optuna-dashboard shows next to the numbers.

    Args:
        folder: of the search.
        metric, costs: of the study.
    """

    def __init__(self, folder: str | Path, metric: str, costs: tuple[str, ...]) -> None:
        with quiet():
            self.store = FileSystemArtifactStore(make_folder(Path(folder) / FOLDER))
        self.metric, self.costs = metric, costs

    def trial(self, trial: Trial, plan: QuantPlan, metrics: Mapping[str, float]) -> None:
        """Writes the note of a trial, with its plan as a table, and the plan as a file.

        Args:
            trial: that was evaluated.
            plan: what it tried.
            metrics: what it scored.
        """
        from optuna_dashboard import save_note  # not at the top: it is an extra

        numbers = ", ".join(f"{name} {metrics[name]:.5g}" for name in (self.metric, *self.costs))
        header = ["layer", *SLOTS]
        rows = [[rule.match, *(str(getattr(rule, slot) or "") for slot in SLOTS)] for rule in plan.rules]
        # A bar would end the cell.
        table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, *rows)]
        table.insert(1, "|---" * len(header) + "|")
        origin = told(trial.user_attrs.get(ORIGIN, "sampled"))
        save_note(trial, "\n".join([f"**{origin}**: {numbers}", "", *table]))
        with temporary_folder("artifact") as folder:
            path = Path(folder, f"plan_{trial.number:03d}.yaml")
            path.write_text(plan.to_yaml(), encoding="utf-8")
            self._upload(path, trial, "text/plain")

    def study(self, result: StudyCandidates, page: Path) -> None:
        """Writes the note of a study, and its page as a file."""
        from optuna_dashboard import save_note

        best = result.best()
        numbers = ", ".join(f"{name} {best.metrics[name]:.5g}" for name in (self.metric, *self.costs))
        if (sure := best.interval) is not None:
            numbers += f" (in {sure.looks} looks {sure.mean:.5g}, from {sure.low:.5g} to {sure.high:.5g})"
        known = result.float_metrics.get(self.metric)
        baseline = "" if known is None else f"; the float model has {self.metric} {known:.5g}"
        front = ", ".join(str(c.number) for c in result.front)
        save_note(result.study, f"Best: trial {best.number}, {numbers}{baseline}.\n\nTrials on the front: {front}.")
        self._upload(page, result.study, "text/html")

    def _upload(self, path: Path, owner: Trial | Study, kind: str) -> None:
        with quiet():
            upload_artifact(
                artifact_store=self.store, file_path=str(path), study_or_trial=owner, mimetype=kind, encoding="utf-8"
            )
