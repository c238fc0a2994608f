"""Files appear whole or not at all; killed processes leave nothing for long."""

import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lq_plugin
from lq_plugin import QuantPlan, plots
from lq_plugin.commands.sensitivity import write as sensitivity_files
from lq_plugin.errors import ExportError, QuantizationError
from lq_plugin.export import export_onnx, save_packed
from lq_plugin.report.data import ReportData
from lq_plugin.report.page import write_page
from lq_plugin.search.sensitivity.measure import SensitivityTable
from lq_plugin.utilities.files import replacing, sweep, temporary_folder, write_file

#: Bytes.
LIMIT = 4096


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Lets no file of this process grow beyond so many bytes: the system fails the write, as it does when a disk is
    full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_with_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    write_file(path, "rules: []\n")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    path.chmod(0o640)
    write_file(path, b"rules: [x]\n")
    assert path.read_text() == "rules: [x]\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize("content", [b"x" * 3 * LIMIT, torch.zeros(2 * LIMIT)], ids=["bytes", "torch.save"])
def test_a_full_disk_leaves_the_earlier_file(
    tmp_path: Path, content: bytes | torch.Tensor, full_disk: Callable[[int], None]
) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"earlier")
    full_disk(LIMIT)
    with pytest.raises(
        ExportError, match=r"cannot write .*net\.safetensors: File too large; the earlier file is unchanged"
    ):
        _put(path, content)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    lq_plugin.prepare(net, "w4a8")
    lq_plugin.calibrate(net, [torch.ones(2, 4)])
    return net.eval()


WRITERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "net.safetensors": save_packed,
    "net.onnx": lambda net, path: export_onnx(net, (torch.ones(2, 4),), path),
    "plan.yaml": lambda net, path: QuantPlan.parse("w4a8").to_yaml(path),
    "report.json": lambda net, path: ReportData("t" * LIMIT).save(path),
    "report.html": lambda net, path: write_page(ReportData("t"), path),
    "curve.png": lambda net, path: plots.save(plots.style.new_figure(3, 3)[0], path),
    "sensitivity.csv": lambda net, path: sensitivity_files(
        [SensitivityTable("loss", {"a": {"b": 1.0}})], path.parent, {}
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_harms_the_earlier_file(
    tmp_path: Path, net: nn.Module, name: str, full_disk: Callable[[int], None]
) -> None:
    path = tmp_path / name
    path.write_text("earlier")
    full_disk(16)
    with pytest.raises(
        QuantizationError, match=f"cannot write .*{name}: File too large; the earlier file is unchanged"
    ):
        WRITERS[name](net, path)
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_error_of_the_writer_stays_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(ZeroDivisionError):
        _put(path, 1)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"cannot write .*none/a\.csv: No such file or directory$"):
        write_file(tmp_path / "none/a.csv", "")


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_file(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, "through")
    reader.join(10)
    assert read == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["n" * 255, "層" * 85])
def test_names_may_be_as_long_as_the_system_takes(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"


def test_writers_with_equal_process_ids_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "front.csv"
    writer = textwrap.dedent(
        f"""
        import os, sys
        os.getpid = lambda: 7
        from lq_plugin.utilities.files import write_file
        for _ in range(300):
            write_file({str(path)!r}, sys.argv[1] * 20000)
        """
    )
    writers = [subprocess.Popen([sys.executable, "-c", writer, letter]) for letter in "AB"]
    seen = set()
    while any(process.poll() is None for process in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [process.returncode for process in writers] == [0, 0]
    assert seen <= {"A" * 20000, "B" * 20000}
    assert [file.name for file in tmp_path.iterdir()] == ["front.csv"]


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".hidden.swp", "plan.yaml", ".front.csv.bak"):
        (tmp_path / name).write_text("the user's")
    (tmp_path / ".front.csv.123").write_text("of an earlier version")
    code = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        from lq_plugin.utilities.files import replacing, temporary_folder
        with replacing({str(tmp_path / "front.csv")!r}) as stream:
            folder = temporary_folder("spill", {str(tmp_path)!r})
            Path(folder.name, "0.pt").write_bytes(b"activations")
            stream.write(b"half")
            stream.flush()
            print("ready", flush=True)
            signal.pause()
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    sweep(tmp_path)
    alive = [file.name for file in tmp_path.iterdir() if file.name.endswith(".lq_part")]
    assert len(alive) == 2, "the process lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    write_file(tmp_path / "other.csv", "")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".front.csv.bak",
        ".hidden.swp",
        "other.csv",
        "plan.yaml",
    ]


def test_a_temporary_folder_goes_with_its_object(tmp_path: Path) -> None:
    with temporary_folder("compile", tmp_path) as folder:
        Path(folder, "kernel.so").write_bytes(b"")
        with temporary_folder("compile", tmp_path):
            assert Path(folder, "kernel.so").exists()
    assert list(tmp_path.iterdir()) == []
    with temporary_folder("compile") as folder:
        assert Path(folder).parent == Path(tempfile.gettempdir())


def _put(path: Path, content: bytes | torch.Tensor | int) -> None:
    with replacing(path, ExportError) as stream:
        if isinstance(content, bytes):
            stream.write(content)
        elif isinstance(content, torch.Tensor):
            torch.save(content, stream)
        else:
            stream.write(b"half")
            stream.write(b"%d" % (content // 0))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
