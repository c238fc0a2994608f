"""`make fuzz`: mutated inputs of every kind, and a table of how they ended.

    python -m tests.fuzz.run --seed 0 --count 10000 --write       # RESULTS.md
    python -m tests.fuzz.run --seed 0 --target "plan files" --case 17     # that case alone, with its traceback

Each target has a process of its own, with limits on memory and on the time of a case; one that dies is a failure of the
case it had.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.fuzz.target import ERROR, OTHER, SAME, Target

RESULTS = Path(__file__).parent / "RESULTS.md"
#: Of one case: seconds of processor time and of the clock; bytes of address space above what a target needs to start.
CPU_SECONDS, SECONDS, MEMORY = 10, 120, 2**30
FAILED = "failure"
#: In place of a case's number: the target cannot be built, or does not take its unmutated input.
BROKEN = -1


class TooLong(BaseException):
    """A case that takes longer than it may."""


def targets() -> dict[str, type[Target]]:
    """Returns every target by its name. They import torch and Lightning, the table does not."""
    from tests.fuzz import files, options, reports, settings

    kinds: tuple[Any, ...] = (
        files.Packed,
        files.Checkpoints,
        files.Plans,
        settings.SearchSettings,
        settings.SweepConfig,
        reports.ReportFile,
        reports.Metrics,
        reports.StudyFile,
        reports.ReportArguments,
        reports.ExplainArguments,
        *options.COMMANDS,
    )
    return {kind.name: kind for kind in kinds}


def generator(seed: int, name: str, case: int) -> random.Random:
    """Returns a generator that makes one case alike, whatever runs before it."""
    return random.Random(f"{seed}/{name}/{case}")


@contextlib.contextmanager
def built(kind: type[Target]) -> Iterator[Target]:
    """The target in a folder of its own, which is the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "a", "b", "c")  # "../.." stays inside
        folder.mkdir(parents=True)
        os.chdir(folder)
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield kind(folder)
        finally:
            logging.disable(logging.NOTSET)
            os.chdir(before)


def attempt(target: Target, seed: int, case: int) -> tuple[str, str]:
    """Returns the outcome of one case, and of a failure its traceback."""
    try:
        return target.outcome(generator(seed, target.name, case)), ""
    except (Exception, TooLong, MemoryError, SystemExit):
        return FAILED, traceback.format_exc()


def too_long(*_: Any) -> None:
    raise TooLong(f"more than {CPU_SECONDS} s of processor time or {SECONDS} s")


def work(name: str, seed: int, first: int, count: int, channel: Any) -> None:
    """The process of a target: sends the outcome of each case."""
    import torch

    torch.set_num_threads(1)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, too_long)
    with contextlib.ExitStack() as stack:
        try:
            target = stack.enter_context(built(targets()[name]))
            target.check()
        except Exception:
            channel.send((BROKEN, FAILED, traceback.format_exc()))
            return
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
        if pages:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        for case in range(first, count):
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            found = attempt(target, seed, case)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.send((case, *found))


def run(name: str, seed: int, count: int) -> Iterator[tuple[int, str, str]]:
    """Yields case, outcome and traceback of `count` cases; `BROKEN` as the case, and no other, where the target itself
    has an error."""
    context, case = multiprocessing.get_context("spawn"), 0
    while case < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, seed, case, count, theirs), daemon=True)
        process.start()
        theirs.close()
        first = case
        try:
            while case < count:
                # The first case waits for the target to be built.
                if not ours.poll(2 * SECONDS + 600 * (case == first)):
                    raise EOFError
                found = ours.recv()
                yield found
                case = count if found[0] == BROKEN else found[0] + 1
        except EOFError:
            process.kill()
            yield case, FAILED, f"the process did not survive it (exit code {process.exitcode}) or hangs"
            case += 1
        process.join()


def shares(count: int, names: dict[str, type[Target]]) -> dict[str, int]:
    """Returns how many of `count` cases each target has, at least one."""
    total = sum(kind.share for kind in names.values())
    return {name: max(1, round(count * kind.share / total)) for name, kind in names.items()}


def table(rows: dict[str, Counter[str]], kinds: dict[str, type[Target]], seed: int, seconds: float) -> str:
    """Returns the outcomes as Markdown."""
    total = sum(sum(row.values()) for row in rows.values())
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "lightning", "hydra-core", "omegaconf", "optuna")
    )
    lines = [
        "# Mutated inputs and how they ended",
        "",
        f"{total} cases, seed {seed}; Python {platform.python_version()}, {packages}; "
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {seconds / 60:.0f} minutes. Made by `make fuzz`.",
        "",
        f"| target | cases | {ERROR} | {SAME} | {OTHER} | failures |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {sum(row.values())} | {row[ERROR]} | {row[SAME]} | {row[OTHER]} | {row[FAILED]} |")
    lines += [
        "",
        "*Own error*: an error of the `QuantizationError` family; what the function's documentation promises next to "
        "it (`load_checkpoint`: torch's own error of keys and shapes); Hydra's of an override that cannot be composed, "
        "or around ours and Python's where a callback cannot be made. A model is as before. "
        "*Same result*: as of the input without the mutation. *Other valid result*:",
        "",
        *(f"- {name}: {kinds[name].legitimate}" for name in rows),
        "",
        "Anything else is a failure: another exception, a changed model, a process that dies, more than "
        f"{CPU_SECONDS} s of processor time, or {MEMORY // 2**20} MiB more memory.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when a case failed."""
    parser = argparse.ArgumentParser("python -m tests.fuzz.run", description="Mutated inputs of every kind.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000, help="cases of all targets together")
    parser.add_argument("--target", action="append", help="one of them (may be given several times)")
    parser.add_argument("--case", type=int, help="this case of the target alone")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args(arguments)
    known = targets()
    if unknown := [name for name in args.target or () if name not in known]:
        parser.error(f"no target {', '.join(unknown)}; there are: {', '.join(known)}")
    kinds = {name: kind for name, kind in known.items() if args.target is None or name in args.target}
    if args.case is not None:
        for kind in kinds.values():
            with built(kind) as target:
                print(target.mutated(generator(args.seed, kind.name, args.case)))
                print(*attempt(target, args.seed, args.case))
        return 0
    rows: dict[str, Counter[str]] = {}
    started, failed = time.perf_counter(), False
    for name, count in shares(args.count, kinds).items():
        rows[name] = Counter()
        for case, outcome, why in run(name, args.seed, count):
            rows[name][outcome] += 1
            if outcome == FAILED:
                failed = True
                if case == BROKEN:
                    print(f"{why}\nan error of the target {name!r}: none of its cases was tried\n", flush=True)
                    continue
                print(
                    f"{why}\nagain: python -m tests.fuzz.run --seed {args.seed} --target '{name}' --case {case}\n",
                    flush=True,
                )
        print(f"{name}: {dict(rows[name])}, {time.perf_counter() - started:.0f} s", flush=True)
    text = table(rows, kinds, args.seed, time.perf_counter() - started)
    print(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
