"""Sources of reports: a saved report, the folder of a run or search, a study in a database."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lq_plugin.errors import QuantizationError, did_you_mean
from lq_plugin.report.certificates import SUFFIX, load_certificate
from lq_plugin.report.codec import decode
from lq_plugin.report.data import ReportData, Sensitivity, Series, digits
from lq_plugin.report.joined import joined, with_sensitivity
from lq_plugin.utilities.passwords import masked, passwords_in, without

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

#: What `lq-report` looks for in a folder.
REPORT, STUDY, LOG, SENSITIVITY = "report.json", "study.db", "metrics.csv", "sensitivity.json"
_HOW = (
    "give a report.json (of a run with QuantMonitor), a folder with one or with a study.db, "
    "or the URL of a study's storage (sqlite:///...)"
)
#: Points of a training curve.
MAX_POINTS = 400


def load_report(source: str | Path, study: str | None = None) -> ReportData:
    """Returns the report of a source.

    Args:
        source: a JSON file, a folder (its newest `report.json`, and a `study.db` next to it or below), a `.db` file, or
            the URL of an Optuna storage.
        study: name of the study, where a storage holds several.

    Raises:
        QuantizationError: there is nothing to report on, saying what would do.
    """
    text = str(source)
    if "://" in text:
        return from_storage(text, study)
    path = Path(source)
    if os.path.isfile(path):  # False, and no error, also for what is too long for a path
        return from_storage(f"sqlite:///{path.resolve()}", study) if path.suffix == ".db" else ReportData.load(path)
    if not os.path.isdir(path):
        raise QuantizationError(f"there is no {text!r}: {_HOW}")
    reports = sorted(path.rglob(REPORT), key=lambda p: p.stat().st_mtime)
    databases = sorted(path.rglob(STUDY), key=lambda p: p.stat().st_mtime)
    certificates = sorted(path.rglob(f"*{SUFFIX}"))
    measured = sorted(path.rglob(SENSITIVITY), key=lambda p: p.stat().st_mtime)
    if not reports and not databases and not certificates and not measured:
        raise QuantizationError(f"{text!r} holds neither {REPORT} nor {STUDY}: {_HOW}")
    saved = [ReportData.load(report) for report in reports]
    models = [(report, found) for report, found in zip(reports, saved, strict=True) if found.model is not None]
    searched = [found for found in saved if found.study is not None]
    exported = [load_certificate(certificate) for certificate in certificates]
    result = ReportData(path.resolve().name)
    if models:
        place, found = models[-1]
        assert found.model is not None
        logged = _training(place, path)
        # A log has every step, the report those that it was asked to keep.
        training = logged + [
            series for series in found.model.training if series.name not in {known.name for known in logged}
        ]
        result = replace(
            found, model=replace(found.model, training=training), notes=[*found.notes, *_others("runs", models)]
        )
    # Before the study's own, which its first plans were chosen by.
    result = replace(result, sensitivity=read_sensitivity(measured[-1]) if measured else result.sensitivity)
    if databases:
        live = from_storage(f"sqlite:///{databases[-1].resolve()}", study)
        known = searched[-1].study if searched else None
        if live.study is not None and known is not None and known.name == live.study.name:
            live = replace(
                live,
                study=replace(live.study, float_metric=known.float_metric, float_bytes=known.float_bytes),
                provenance=searched[-1].provenance,
            )
        result = joined(result, live)
        result = replace(result, notes=[*result.notes, *_others("studies", databases)])
    elif searched:
        result = joined(result, searched[-1])
    result = with_sensitivity(result)
    if result.model is None and result.study is not None:
        result = replace(result, title=result.study.name)
    return replace(result, files=[*result.files, *exported])


def read_sensitivity(path: Path) -> Sensitivity:
    """Returns the first measure of a file that `lq-sensitivity` wrote.

    Raises:
        QuantizationError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measure, values = next(iter(content["measures"].items()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise QuantizationError(f"{path} holds no sensitivities: {type(error).__name__}: {error}") from error
    found = decode(Sensitivity, {"measure": measure, "values": values}, str(path))
    return Sensitivity(measure, {u: {c: digits(v) for c, v in row.items()} for u, row in found.values.items()})


def _others(what: str, found: Sequence[Any]) -> list[str]:
    return [f"The newest of {len(found)} {what} in this folder."] if len(found) > 1 else []


def from_storage(url: str, name: str | None = None) -> ReportData:
    """Returns the report of a study in an Optuna storage, which is only read.

    Raises:
        QuantizationError: no such storage or study, several without a name, or one that is not of lq_plugin.
    """
    import optuna

    from lq_plugin.search.shared.database import quiet
    from lq_plugin.search.shared.storage import FINGERPRINT
    from lq_plugin.search.study.report import study_report
    from lq_plugin.search.study.result import SearchResult

    shown = masked(url)
    try:
        with quiet():
            storage = _read_only(url)
            names = optuna.get_all_study_names(storage)
            if not names:
                raise QuantizationError(f"{shown} holds no study")
            if name is None and len(names) > 1:
                raise QuantizationError(
                    f"{shown} holds {len(names)} studies: {', '.join(names)}; choose one with --study"
                )
            if name is not None and name not in names:
                raise QuantizationError(
                    f"{shown} holds no study {name!r}; there: {', '.join(names)}.{did_you_mean(name, names)}"
                )
            study = optuna.load_study(study_name=name or names[0], storage=storage)
        made_for = study.user_attrs.get(FINGERPRINT)
        if made_for is None:
            raise QuantizationError(
                f"study {study.study_name!r} was not made by lq_plugin, so its trials have no plans"
            )
        costs = [cost for cost in str(made_for.get("cost", "")).split(", ") if cost]
        return study_report(SearchResult(study, made_for["metric"], costs, made_for["mode"] == "max", {}))
    except QuantizationError:
        raise
    except Exception as error:
        # A database that was edited or cut can hold anything.
        told = without(str(getattr(error.__cause__, "orig", None) or error), passwords_in(url))
        raise QuantizationError(f"cannot read {shown}: {type(error).__name__}: {told}") from error


def _read_only(url: str) -> RDBStorage:
    """Returns Optuna's storage on a read-only connection: it would make its tables in any database."""
    from optuna.storages import RDBStorage
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.engine import make_url

    from lq_plugin.search.shared.database import sqlite_file

    options: dict[str, Any] = {}
    if (file := sqlite_file(url)) is not None:
        if not file.is_file():
            raise QuantizationError(f"there is no database {str(file)!r}: {_HOW}")
        # A reader of a write-ahead log makes files next to it, unless it is told that there is no writer.
        with file.open("rb") as stream:
            write_ahead = stream.read(20)[18:] == b"\x02\x02"
        unused = write_ahead and not file.with_name(f"{file.name}-wal").exists()
        opened = f"sqlite:///file:{quote(str(file.resolve()))}?mode=ro&uri=true" + "&immutable=1" * unused
    else:
        opened = url
        if make_url(url).get_backend_name() == "postgresql":
            options["execution_options"] = {"postgresql_readonly": True}
    engine = create_engine(opened, **options)
    try:
        if not inspect(engine).has_table("studies"):
            raise QuantizationError(f"{masked(url)} is no storage of Optuna: it has no table of studies")
    finally:
        engine.dispose()
    return RDBStorage(opened, engine_kwargs=options)


def _training(report: Path, root: Path) -> list[Series]:
    """Returns the curves that a `CSVLogger` wrote next to the report, or between it and `root`."""
    for folder in report.parents:
        if (log := folder / LOG).is_file():
            return read_log(log)
        if folder == root:
            break
    return []


def read_log(path: str | Path) -> list[Series]:
    """Returns the columns of a `CSVLogger`'s `metrics.csv`, thinned to `MAX_POINTS`, without those of one number.

    Raises:
        QuantizationError: a file that cannot be read, or that has no number in a cell, naming the line.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    line = 1
    try:
        with Path(path).open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                line = reader.line_num
                if not (row.get("step") or "").isdigit():
                    continue
                for name, text in row.items():
                    if name in ("step", "epoch") or not text or name is None:
                        continue
                    steps, values = found.setdefault(name, ([], []))
                    # The evaluation after a fit logs at its last step again.
                    if isfinite(value := float(text)) and (not steps or steps[-1] != int(row["step"])):
                        steps.append(int(row["step"]))
                        values.append(digits(value))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise QuantizationError(f"cannot read {path}, line {line} or the next: {error}") from error
    series = []
    for name, (steps, values) in found.items():
        keep = range(0, len(steps), max(1, -(-len(steps) // MAX_POINTS)))
        if len(steps) > 1 and len(set(steps)) > 1:
            series.append(Series(name, [steps[i] for i in keep], [values[i] for i in keep]))
    return series
