"""Files that appear whole or not at all, and temporary folders; the next process sweeps what a killed one left.

A temporary file or folder lies next to what it becomes, under a name of its own, and is locked while its process lives.
The lock ends with the process, whatever ended it: what bears such a name and is not locked is nobody's. Process ids
tell nothing of the kind, since containers that share a folder have equal ones.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lq_plugin.errors import QuantizationError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is swept.
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".lq_part"
#: File in each folder that was written as a whole: such a folder may be replaced by another one.
_FOLDER_MARK = ".lq_plugin_export"
#: Second, what earlier versions named after a process id.
_TEMPORARY = re.compile(
    r"\..+\.[a-z0-9_]{8,16}\.lq_part|\.(front\.csv|pareto\.png|report\.json|report\.html|plan_.+\.yaml|unit_\d+\.safetensors)\.\d+"
)


@contextlib.contextmanager
def replacing(path: str | Path, error: type[QuantizationError] = QuantizationError) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the place of `path` at the end of the block, synced to the disk.

    When the block raises, `path` stays as it was. A link is followed, permissions stay, and what is no ordinary file
    (`/dev/stdout`, a pipe) is written to directly.

    Args:
        path: in a folder that exists.
        error: what a file that cannot be written raises.

    Raises:
        QuantizationError: (as `error`) naming the path and what the system says.

    >>> path = Path(tempfile.mkdtemp(), "front.csv")
    >>> with replacing(path) as stream:
    ...     _ = stream.write(b"trial,bits")
    >>> path.read_text(), [file.name for file in path.parent.iterdir()]
    ('trial,bits', ['front.csv'])
    """
    with named_faults(path, error) as say:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            with open(target, "wb") as stream:
                yield stream
            return
        if target.exists():
            say.append("the earlier file is unchanged")
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, "the file is write-protected")
        sweep(target.parent)
        with _temporary(target) as stream:
            try:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                if target.exists():
                    shutil.copymode(target, stream.name)
                if fcntl is None:  # Windows renames no open file
                    stream.close()
                os.replace(stream.name, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(stream.name)
                raise
        _sync_folder(target.parent)


@contextlib.contextmanager
def named_faults(path: str | Path, error: type[QuantizationError]) -> Iterator[list[str]]:
    """Turns the system's errors of writing `path` into an `error` that names it.

    Yields:
        What else the error says; to append to.
    """
    also: list[str] = []
    try:
        yield also
    except (OSError, RuntimeError) as fault:
        # torch.save hides the system's error in one of its own.
        cause = fault if isinstance(fault, OSError) else fault.__context__
        if not isinstance(cause, OSError):
            raise
        raise error("; ".join([f"cannot write {path}: {cause.strerror or cause}", *also])) from fault


def write_file(path: str | Path, content: str | bytes, error: type[QuantizationError] = QuantizationError) -> None:
    """Writes a whole file, text as UTF-8, see `replacing`.

    Args:
        path: of the file.
        content: text, or bytes.
        error: class of the error where it cannot be written.
    """
    with replacing(path, error) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing_folder(path: str | Path, error: type[QuantizationError] = QuantizationError) -> Iterator[Path]:
    """Makes an empty folder that takes the place of `path` at the end of the block, synced to the disk.

    When the block raises, `path` stays as it was. An earlier folder of this kind is moved aside for the moment in which
    the new one gets its name.

    Args:
        path: in a folder that exists; `replaceable`.
        error: what a folder that cannot be written raises.

    Raises:
        QuantizationError: (as `error`) naming the path and what the system says.

    >>> path = Path(tempfile.mkdtemp(), "model")
    >>> for text in ("first", "second"):
    ...     with replacing_folder(path) as folder:
    ...         _ = (folder / "config.json").write_text(text)
    >>> (path / "config.json").read_text(), [found.name for found in path.parent.iterdir()]
    ('second', ['model'])
    """
    with named_faults(path, error), contextlib.ExitStack() as stack:
        target = Path(os.path.realpath(path))
        if not replaceable(target):
            raise FileExistsError(errno.EEXIST, "there is something that no export wrote")
        aside = Path(stack.enter_context(temporary_folder(target.name[:40], target.parent)))
        made, earlier = aside / "made", aside / "earlier"
        made.mkdir()
        yield made
        (made / _FOLDER_MARK).touch()
        for file in made.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as stream:
                    os.fsync(stream.fileno())
        if target.exists():
            os.rename(target, earlier)
        try:
            os.rename(made, target)
        except OSError:
            if earlier.exists():
                os.rename(earlier, target)
            raise
        _sync_folder(target.parent)


def replaceable(path: Path) -> bool:
    """Returns True where nothing is at `path`, or an empty folder, or one that `replacing_folder` made."""
    if not path.exists():
        return True
    return path.is_dir() and ((path / _FOLDER_MARK).is_file() or not any(path.iterdir()))


def make_folder(path: str | Path, error: type[QuantizationError] = QuantizationError) -> Path:
    """Makes a folder and its parents, and returns it.

    Raises:
        QuantizationError: (as `error`) naming the path and what the system says.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise error(f"cannot make the folder {path}: {fault.strerror or fault}") from fault
    return Path(path)


def file_name(name: str) -> str:
    """Returns a name that every system takes for a file: of letters, digits, `.`, `_` and `-`, and not too long.

    >>> file_name("layer_a/b"), len(file_name("x" * 300)), file_name("x" * 300) == file_name("x" * 301)
    ('layer_a_b', 57, False)
    """
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    if len(safe.encode()) <= 200:
        return safe
    return f"{safe[:40]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def temporary_folder(name: str, parent: str | Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Makes a folder that is removed with the object, and sweeps what killed processes left next to it.

    Args:
        name: what it is for; a part of its own name.
        parent: where; None: the system's folder for temporary files.
    """
    parent = tempfile.gettempdir() if parent is None else parent
    sweep(parent)
    while True:
        folder = tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=_SUFFIX, dir=parent)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder.name, os.O_RDONLY)
            weakref.finalize(folder, os.close, descriptor)
            if _claim(descriptor, folder.name):
                return folder
        folder.cleanup()  # another process has swept it before it was claimed


def sweep(folder: str | Path) -> None:
    """Removes temporary files and folders whose process is gone. What cannot be read or locked is left alone."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if _TEMPORARY.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                is_folder = entry.is_dir(follow_symlinks=False)
                # Some network file systems lock only what is open for writing.
                descriptor = os.open(entry.path, os.O_NOFOLLOW | (os.O_RDONLY if is_folder else os.O_RDWR))
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_folder:
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[BinaryIO]:
    """Opens an empty file next to `target` that nobody sweeps while it is open."""
    while True:
        # Of a long name a part, since the system bounds names.
        path = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}{_SUFFIX}")
        with open(path, "x+b") as stream:
            if _claim(stream.fileno(), path):
                yield stream
                return


def _claim(descriptor: int, path: str | Path) -> bool:
    """Locks an open file or folder; returns False if another process swept it before it was locked."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks, where nobody sweeps either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
