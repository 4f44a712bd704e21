"""What goes to a GPU machine and comes back of it as files: the carried wheel, the archive of
results."""

import json
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu
import gpu_archive
import gpu_carry
import gpu_merge
import gpu_runner
import gpu_steps
import pytest

PYTHON, MACHINE = "cp{}{}".format(*sys.version_info), platform.machine()
PARTS = {
    f"_C.cpython-{PYTHON[2:]}-x86_64-linux-gnu.so": "_C",
    "_ops_cpu.so": "cpu",
    "_ops_cuda.so": "cuda",
    "_build_info.json": "{}",
}


def wheel(folder, tag=PYTHON, machine=MACHINE, **about):
    """A carried wheel, and another library's."""
    name = f"llmos_kernels-0.1.0-{tag}-{tag}-manylinux_2_34_{machine}.whl"
    others = {"__init__.py": "", "pack/sm_90.json": "index", "pack/sm_90.bin": "cubins"}
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as made:
        for file, text in {**PARTS, **others}.items():
            made.writestr(f"llmos_kernels/{file}", text)
        made.writestr("llmos_kernels-0.1.0.dist-info/RECORD", "")
    with zipfile.ZipFile(folder / "other-1-py3-none-any.whl", "w") as made:
        made.writestr("other/__init__.py", "")
    carried = {"wheel": name, "sources": "these", "arch": "9.0", "modules": []}
    gpu_merge.write(folder / "carried.json", carried | about)
    return folder / name


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of its own, in which nothing is compiled."""
    (tmp_path / "llmos_kernels").mkdir()
    for name, path in (
        ("FOLDER", ".gpu-carry"),
        ("PACKAGE", "llmos_kernels"),
        ("PACK", "pack"),
        ("PEERS", "peers"),
        ("ROOT", ""),
    ):
        monkeypatch.setattr(gpu_carry, name, tmp_path / path)
    monkeypatch.setattr(gpu_carry, "sources", lambda: "these")
    monkeypatch.setattr(gpu_carry, "ARCH", "9.0")
    monkeypatch.setattr(gpu_carry, "REHEARSE", False)
    monkeypatch.setattr(gpu_carry, "loads", lambda: True)
    return tmp_path


@pytest.fixture
def commands(tree, monkeypatch):
    """What was to be run in the tree, without its Python."""
    made = []

    def run(command, **_):
        made.append([str(part) for part in command[1:]])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_carry.subprocess, "run", run)
    return made


BUILD = ["setup.py", "-q", "build_ext", "--inplace"]


def test_carried_wheel(tree, commands, capsys):
    """Its compiled parts go into the tree, its pack and other libraries beside it; nothing else
    does."""
    wheel(tree / ".gpu-carry")
    loaded = tree / "loaded"
    loaded.write_text("of another build")
    (tree / "llmos_kernels" / "_ops_cpu.so").hardlink_to(loaded)
    assert gpu_carry.main(["build"]) == 0
    assert loaded.read_text() == "of another build"
    assert {p.name: p.read_text() for p in (tree / "llmos_kernels").iterdir()} == PARTS
    assert (tree / "peers" / "other" / "__init__.py").exists()
    assert gpu_carry.main(["pack"]) == 0
    found = {p.name: p.read_text() for p in (tree / "pack").iterdir()}
    assert found == {"sm_90.json": "index", "sm_90.bin": "cubins"}
    assert commands == []
    shown = capsys.readouterr().out
    assert "unpacked _C.cpython" in shown and "unpacked other-1" in shown
    assert "unpacked sm_90.json, sm_90.bin of llmos_kernels-0.1.0" in shown


@pytest.mark.parametrize(
    "about, why",
    [
        ({"sources": "others"}, "of other sources"),
        ({"tag": "cp39"}, f"is not for {PYTHON} on"),
        ({"machine": "vax"}, f"on {MACHINE}"),
        ({"arch": "8.6"}, "is for 8.6, not for 9.0"),
        ({"wheel": "lost.whl"}, "lost.whl is not in .gpu-carry"),
        (None, "nothing is in .gpu-carry"),
    ],
    ids=["sources", "python", "machine", "arch", "lost", "nothing"],
)
def test_carried_wheel_of_no_use(tree, commands, capsys, about, why):
    """It says why, and compiles."""
    if about is not None:
        wheel(tree / ".gpu-carry", **about)
    assert gpu_carry.main(["build"]) == gpu_carry.main(["pack", "--jobs", "3"]) == 0
    compiler = ["-m", "llmos_kernels._tools.build_pack", str(tree / "pack"), "9.0", "--jobs", "3"]
    assert commands == [BUILD, compiler]
    shown = capsys.readouterr().out
    assert shown.count(why) == 2 and "compiling the extension" in shown
    assert not list((tree / "llmos_kernels").iterdir()) and not (tree / "pack").exists()


def test_carried_wheel_that_does_not_load(tree, commands, monkeypatch, capsys):
    """As where the machine's C library is older."""
    wheel(tree / ".gpu-carry")
    monkeypatch.setattr(gpu_carry, "loads", lambda: False)
    assert gpu_carry.main(["build"]) == 0 and commands == [BUILD]
    assert "does not load" in capsys.readouterr().out
    assert not list((tree / "llmos_kernels").iterdir())


def test_rehearsal_in_a_tree_that_others_use(tree, commands, monkeypatch):
    """Its extension stays, and nothing is compiled."""
    wheel(tree / ".gpu-carry")
    monkeypatch.setattr(gpu_carry, "REHEARSE", True)
    extension = tree / "llmos_kernels" / "_ops_cpu.so"
    extension.write_text("own")
    assert gpu_carry.main(["build"]) == 0 and extension.read_text() == "own"
    extension.unlink()
    assert gpu_carry.main(["build"]) == 0 and extension.read_text() == "cpu"
    assert commands == []


def test_part_of_the_pack(tree, commands):
    """It serves who asks for no more."""
    wheel(tree / ".gpu-carry", modules=["activation", "linear"])
    for modules, compiled in (["linear"], 0), (["linear", "int8"], 1), ([], 2):
        assert gpu_carry.main(["pack", "--modules", *modules]) == 0
        assert len(commands) == compiled
    assert commands[0][-2:] == ["linear", "int8"]


def test_whether_the_extension_loads(tmp_path, monkeypatch, capfd):
    """A Python is asked, of this tree's package."""
    monkeypatch.setattr(gpu_carry, "ROOT", tmp_path)
    assert not gpu_carry.loads()
    package = tmp_path / "llmos_kernels"
    package.mkdir()
    for name, text in (("__init__.py", ""), ("_C.py", ""), ("_build_info.json", '{"torch": "2"}')):
        (package / name).write_text(text)
    assert gpu_carry.loads()
    assert "built with torch 2 and loaded by torch " in capfd.readouterr().out


@pytest.fixture
def making(tree, monkeypatch):
    """``make`` with a wheel that is there."""
    (tree / "requirements").mkdir()
    (tree / "requirements" / "demo.txt").write_text("torch==2.13.0\n")
    (tree / "requirements" / "tests.txt").write_text("mypy==1\n")
    made, installed = {}, []

    def run(command, env=None, **_):
        if "git" in command:
            return subprocess.CompletedProcess(command, 0, stdout="")
        if str(command[1]).endswith("wheel.py"):
            made.update(env)
            wheel(Path(command[2]))
            Path(command[2], "other-1-py3-none-any.whl").unlink()
        return subprocess.CompletedProcess(command, 0)

    def pip(python, *arguments):
        installed.append(arguments)
        if "download" in arguments:
            raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(gpu_carry.subprocess, "run", run)
    monkeypatch.setattr(gpu_carry, "pip", pip)
    return made, installed


def test_make(tree, making, monkeypatch, capsys):
    """A wheel for the steps, in place of the former; other libraries where they can be had."""
    env, installed = making
    monkeypatch.setenv("LLMOS_BACKEND", "reference")
    (tree / ".gpu-carry").mkdir()
    (tree / ".gpu-carry" / "former-1-py3-none-any.whl").touch()
    assert gpu_carry.main(["make", "--modules", "activation", "linear"]) == 0
    assert env["LLMOS_BUILD_PACK"] == "activation,linear" and env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "LLMOS_BACKEND" not in env
    assert installed[0] == ("install", "-q", "torch==2.13.0")
    assert "without liger-kernel" in capsys.readouterr().out
    assert len(list((tree / ".gpu-carry").glob("*.whl"))) == 1
    assert gpu_carry.refused(["linear"]) is None and gpu_carry.refused([]) is not None


def test_make_of_too_much(tree, making, monkeypatch):
    (tree / ".gpu-carry").mkdir()
    (tree / ".gpu-carry" / "gpu.zip").write_bytes(bytes(3 * 2**20))
    with pytest.raises(SystemExit, match="more than the 1 MiB of --at-most"):
        gpu_carry.main(["make", "--at-most", "1"])


def test_make_while_sources_change(tree, making, monkeypatch):
    sums = iter(("these", "others"))
    monkeypatch.setattr(gpu_carry, "sources", lambda: next(sums))
    with pytest.raises(SystemExit, match="changed"):
        gpu_carry.main(["make"])
    assert not (tree / ".gpu-carry" / "carried.json").exists()


def test_make_without_a_part(tree, making, monkeypatch):
    """As where there is no nvcc."""
    monkeypatch.delitem(PARTS, "_ops_cuda.so")
    with pytest.raises(SystemExit, match="no _ops_cuda"):
        gpu_carry.main(["make"])


def test_git_ignores_what_is_carried():
    """And what is unpacked."""
    root = gpu_steps.ROOT
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    names = [".gpu-carry/carried.json", *(f"llmos_kernels/{name}" for name in PARTS)]
    done = subprocess.run(
        ["git", "-C", root, "check-ignore", *names], capture_output=True, text=True
    )
    assert done.stdout.split() == names


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Where a call's steps would work."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "OUT", tmp_path / "out")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "slices", lambda *_: {})
    return tmp_path / "work"


def test_archive_is_replaced_in_one_step(tmp_path, monkeypatch):
    folder, archive = tmp_path / "work", tmp_path / "out" / gpu_archive.NAME
    gpu_merge.write(folder / "a.json", {"a": 1})
    gpu_archive.archive_folder(folder, archive)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu_archive.archive_folder(folder, archive)
    with zipfile.ZipFile(archive) as opened:
        assert json.loads(opened.read("a.json")) == {"a": 1}


@pytest.mark.parametrize(
    "name", ["/tmp/a.json", "../a.json", "a/../../b.json", "..\\a", "c:a", "a//b"]
)
def test_archive_with_a_hostile_name(work, tmp_path, name, capsys):
    """Nothing of it is written, by whatever reads it."""
    hostile = tmp_path / "hostile.zip"
    with zipfile.ZipFile(hostile, "w") as made:
        made.writestr("about.json", '{"machine": "x"}')
        made.writestr(name, "{}")
    for option in ("--merge", "--resume-from"):
        assert gpu.main([option, str(hostile)]) == 2
        assert "a member named" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a member named"):
        gpu_carry.unpack(hostile, tmp_path / "to", lambda name: name)
    assert not work.exists() and [p.name for p in tmp_path.iterdir()] == ["hostile.zip"]


@pytest.mark.parametrize("content", [None, "no archive"])
def test_archive_that_is_none(work, tmp_path, content, capsys):
    if content:
        (tmp_path / "a.zip").write_text(content)
    assert gpu.main(["--resume-from", str(tmp_path / "a.zip")]) == 2
    assert "a.zip" in capsys.readouterr().err and not work.exists()


def test_name_of_the_gpu(tmp_path, monkeypatch):
    """As benchmarks/machine.py makes it of torch's."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho NVIDIA A100 80GB PCIe\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.gpu_name() == "nvidia-a100-80gb-pcie"
    monkeypatch.setenv("PATH", "")
    assert gpu.gpu_name() is None


def test_sum_of_files(tmp_path):
    """Those that are named count whatever they are called, the pack's C++ counts, a made pack
    not."""
    sums = [gpu_runner.sources_sum((), tmp_path)]
    for name in ("CMakeLists.txt", "csrc/pack/a.cpp", "llmos_kernels/pack/sm_90.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        sums.append(gpu_runner.sources_sum(("csrc", "llmos_kernels", "CMakeLists.txt"), tmp_path))
    assert len({*sums}) == 3 and sums[2] == sums[3]
