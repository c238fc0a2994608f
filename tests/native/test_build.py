"""Compiling on first use: what is kept, what is made again, and what happens where it cannot be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from lq_plugin.native import NativeError, available
from lq_plugin.native.build import cache, compiled, library

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('#include "number.h"\nextern "C" int answer(void) { return NUMBER; }\n', encoding="utf-8")
    path.with_name("number.h").write_text("#define NUMBER 42\n", encoding="utf-8")
    return path


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def test_it_is_compiled_once(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    first = compiled(source, folder)
    made = first.stat().st_mtime_ns
    assert answer(first) == 42
    assert compiled(source, folder) == first
    assert first.stat().st_mtime_ns == made
    assert list(folder.iterdir()) == [first]


def test_a_changed_header_or_compiler_makes_another(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(source, tmp_path)
    source.with_name("number.h").write_text("#define NUMBER 43\n", encoding="utf-8")
    second = compiled(source, tmp_path)
    assert second != first
    assert (answer(first), answer(second)) == (42, 43)
    monkeypatch.setenv("CXX", "c++ -DOTHER")
    assert compiled(source, tmp_path) not in (first, second)


@pytest.mark.parametrize("leftover", ["lock", "tmp_of_one_that_was_killed"])
def test_what_a_killed_process_left_stops_nobody(source: Path, tmp_path: Path, leftover: str) -> None:
    folder = tmp_path / "kept"
    (folder / leftover).mkdir(parents=True)
    assert answer(compiled(source, folder)) == 42


def test_processes_that_compile_at_once(source: Path, tmp_path: Path) -> None:
    script = f"""if True:
        import ctypes
        from pathlib import Path
        from lq_plugin.native.build import compiled
        print(ctypes.CDLL(str(compiled(Path({str(source)!r}), Path({str(tmp_path / "kept")!r})))).answer())"""
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["42\n"] * 3
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize("harm", ["cut", "one bit", "empty"])
def test_a_damaged_library_is_compiled_again(
    source: Path, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    first = compiled(source, folder)
    whole = first.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:middle],
        "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
    }
    # A new file: one that is loaded is not to be written into.
    first.unlink()
    first.write_bytes(damaged[harm])
    again = compiled(source, folder)
    assert again.read_bytes() != damaged[harm]
    assert answer(again) == 42
    assert "is damaged and compiled again" in caplog.text
    assert list(folder.iterdir()) == [again]


def test_what_the_compiler_says(source: Path, tmp_path: Path) -> None:
    source.write_text("nonsense", encoding="utf-8")
    with pytest.raises(NativeError, match=r"answer.cpp gave 1.*nonsense") as caught:
        compiled(source, tmp_path)
    assert "-ffp-contract=off" in str(caught.value)


def test_without_a_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LQ_NATIVE_CACHE", str(tmp_path))
    with pytest.raises(NativeError, match=r"need a C\+\+ compiler.*no-such-compiler"):
        library("answer", source.parent)


def test_a_folder_that_cannot_be_made(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LQ_NATIVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(NativeError, match="a folder to write to"):
        library("answer", source.parent)


def test_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LQ_NATIVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache() == tmp_path / "lq_plugin"
    monkeypatch.setenv("LQ_NATIVE_CACHE", str(tmp_path / "x"))
    assert cache() == tmp_path / "x"
