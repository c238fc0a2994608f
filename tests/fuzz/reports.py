"""Report data as `lq-report` reads it, and the arguments of `lq-report` and `lq-explain`."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lq_plugin.commands.explain import explain
from lq_plugin.commands.report import report
from lq_plugin.errors import QuantizationError
from tests.fuzz.mutate import EXTREMES, mutated, other_text
from tests.fuzz.target import OTHER, SAME, Failure, Target
from tests.report.synthetic import deep_report, large_study


def command(function: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> str:
    """Runs a command as its entry point does; returns what it printed.

    Raises:
        QuantizationError: it ended with a message and exit code 2.
        Failure: another exit code, or none of its own words.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as a terminal
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = function(arguments)
        except SystemExit as stop:
            code = stop.code
        out.flush()
        err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if code == 2 and said:
        raise QuantizationError(said)
    if code:
        raise Failure(f"exit code {code}: {said}")
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


class Reports(Target):
    """A file that `lq-report` makes a page of."""

    file: str

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source = folder / "run"
        self.source.mkdir()
        self.build()
        self.original = (self.source / self.file).read_bytes()
        self.wanted = self.page()

    def build(self) -> None:
        deep_report(layers=8, width=8).save(self.source / "report.json")

    def unmutated(self) -> Any:
        return self.original

    def page(self) -> str:
        path = self.folder / "page.html"
        path.unlink(missing_ok=True)
        command(report, [str(self.source), "--no-pictures", "-o", str(path)])
        return path.read_text(encoding="utf-8")

    def use(self, case: Any) -> str:
        (self.source / self.file).write_bytes(case)
        return SAME if self.page() == self.wanted else OTHER


class ReportFile(Reports):
    name = "report.json"
    file = "report.json"
    share = 700
    legitimate = "a name, note or number of the right kind: the page shows what the file says"

    def mutated(self, rng: random.Random) -> Any:
        text = self.original.decode()
        if rng.random() < 0.1:
            return text[: rng.randrange(len(text))].encode()
        return json.dumps(mutated(rng, json.loads(text))).encode()


class Metrics(Reports):
    name = "metrics.csv"
    file = "metrics.csv"
    share = 500
    legitimate = "another number, name of a column, or fewer rows: other curves on the page"

    def build(self) -> None:
        super().build()
        lines = [
            "epoch,step,train/loss,val/acc",
            *(f"{i // 4},{i * 10},{1 / (1 + i)},{'' if i % 4 else i / 20}" for i in range(16)),
        ]
        (self.source / self.file).write_text("\n".join(lines) + "\n")

    def mutated(self, rng: random.Random) -> Any:
        text = self.original.decode()
        if rng.random() < 0.4:
            return other_text(rng, text).encode("utf-8", "surrogateescape")
        rows = mutated(rng, [line.split(",") for line in text.splitlines()])
        lines = [
            ",".join(map(str, row)) if isinstance(row, list) else str(row)
            for row in (rows if isinstance(rows, list) else [rows])
        ]
        return "\n".join(lines).encode("utf-8", "surrogateescape")


class StudyFile(Reports):
    name = "study.db"
    file = "study.db"
    share = 300
    legitimate = (
        "a number, name or JSON value of the right kind, or what the page has no place for: other trials on the page"
    )

    def build(self) -> None:
        large_study(trials=6, layers=2, storage=f"sqlite:///{self.source / self.file}")

    def mutated(self, rng: random.Random) -> Any:
        if rng.random() < 0.1:
            return self.original[: rng.randrange(len(self.original))]
        path = self.folder / "changed.db"
        path.write_bytes(self.original)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            tables = [
                row[0]
                for row in connection.execute("select name from sqlite_master where type = 'table' order by name")
            ]
            table = rng.choice(
                [table for table in tables if connection.execute(f"select count(*) from {table}").fetchone()[0]]
            )
            columns = [row[1] for row in connection.execute(f"pragma table_info({table})")]
            column = rng.choice(columns)
            row, old = rng.choice(connection.execute(f"select rowid, {column} from {table}").fetchall())
            kind = rng.randrange(6)
            if kind == 0:
                connection.execute(f"delete from {table} where rowid = ?", [row])
            elif kind == 1 and column.endswith("json"):
                new = json.dumps(mutated(rng, json.loads(old))) if old else "{"
                connection.execute(f"update {table} set {column} = ? where rowid = ?", [new, row])
            elif kind == 2:
                connection.execute(f"drop table {table}")
            else:
                values = [
                    v for v in EXTREMES if v is None or (isinstance(v, str) and v.isprintable()) or isinstance(v, float)
                ]
                with contextlib.suppress(sqlite3.IntegrityError):
                    connection.execute(
                        f"update {table} set {column} = ? where rowid = ?", [rng.choice([*values, -1, 2**62]), row]
                    )
            connection.commit()
        return path.read_bytes()


def mutated_arguments(rng: random.Random, arguments: list[str], words: Sequence[str]) -> list[str]:
    """Returns arguments of a command line, which cannot hold a null byte, after a few changes."""
    texts = [value for value in EXTREMES if isinstance(value, str)]
    found = list(arguments)
    for _ in range(rng.choice([1, 1, 2])):
        index = rng.randrange(len(found) or 1)
        kind = rng.randrange(5)
        if kind == 0:
            del found[index : index + 1]
        elif kind == 1:
            found.insert(index, rng.choice([*words, *texts]))
        elif kind == 2 and found:
            found[index] = other_text(rng, found[index])
        else:
            found[index : index + 1] = [rng.choice([*words, *words, *texts])]
    return [argument.replace("\0", "0") for argument in found]


class ReportArguments(Target):
    name = "lq-report arguments"
    share = 300
    legitimate = "another place for the page, fewer pictures, help, or another order"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        deep_report(layers=8, width=8).save(folder / "report.json")
        large_study(trials=6, layers=2, storage=f"sqlite:///{folder / 'study.db'}")
        self.given = ["report.json", "-o", "page.html", "--no-pictures", "--layers", "2", "--study", "large"]

    def unmutated(self) -> Any:
        return self.given

    def mutated(self, rng: random.Random) -> list[str]:
        words = ["report.json", "study.db", "sqlite:///study.db", "sqlite:///", "mysql://u:p@nowhere/x", "nowhere://",
                 "://", ".", "--layers=-1", "--layers=x", "--pictures", "--study", "--help", "page.html", "other",
                 "sqlite:///nowhere.db", "--output=folder/x.html"]  # fmt: skip
        return [a for a in mutated_arguments(rng, self.given, words) if a != "" or rng.random() < 0.5]

    def use(self, case: list[str]) -> str:
        # Pictures take seconds, and other data has its own target.
        command(report, [*case, *(() if "--no-pictures" in case else ("--no-pictures",))])
        return SAME if case == self.given else OTHER


class ExplainArguments(Target):
    name = "lq-explain arguments"
    share = 500
    legitimate = "another plan, another model of those that are named, help, or JSON instead of tables"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.given = ["w4a8", "torch.nn:Linear", "in_features=4", "out_features=2", "--shape", "1,4"]
        self.wanted = command(explain, self.given)

    def unmutated(self) -> Any:
        return self.given

    def mutated(self, rng: random.Random) -> list[str]:
        # A name of a model runs the code that it names: these are harmless.
        models = ["torch.nn:Linearr", "torch.nn", "nowhere:x", ":", "torch.nn:", ":Linear", "torch.nn:Module",
                  "torch.nn:functional", "digits_cnn", "torch.nn:Linear.forward", "torch.nn:ReLU", "", "+model=x",
                  "digits_cnn/x", "../x", "json:loads", "builtins:dict"]  # fmt: skip
        words = ["--json", "--shape", "--defaults", "--help", "--config-dir", "w2", "w4a8 mse", "in_features=-1",
                 "in_features=x", "in_features=", "=4", "bias=[", "bias=!!x", "bias=false", "device=nowhere", "dtype=1",
                 "1,3,8,8", "0,4", "1,-4", "1x4", "4", "1,,4", "x=${y"]  # fmt: skip
        found = mutated_arguments(rng, self.given, words)
        return [rng.choice(models) if ":" in a or rng.random() < 0.05 else a for a in found]

    def use(self, case: list[str]) -> str:
        return SAME if command(explain, case) == self.wanted else OTHER
