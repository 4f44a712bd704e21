"""The pack of precompiled kernels: lookup, launches, errors; with a fake CUDA driver, no GPU."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from llmos_kernels._core import registry
from llmos_kernels._tools import environment
from llmos_kernels._triton.runtime import kernel_pack

HELPERS = Path(__file__).parents[1] / "helpers"


def session(*args, script="pack_session.py", **env):
    """Run a script with Triton's compiler; return the lines that it prints."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOS", "TRITON"))}
    done = subprocess.run(
        [sys.executable, HELPERS / script, *map(str, args)],
        env=environment | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_keys(arch):
    """The C++ launcher, ``launch_of`` and Triton specialise calls alike."""
    (line,) = session("keys", arch)
    launches, keys = int(line.split()[0]), int(line.split()[2])
    assert launches > keys > 1000


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_common_models_are_covered(arch):
    (line,) = session("covered", arch)
    assert int(line.split()[0]) > 300


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Return a fake libcuda.so.1 that accepts every launch and records the last one."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    name = "-Wl,-soname,libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-pthread", name, "-o", library, HELPERS / "fake_cuda.c"],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def folder(driver, tmp_path_factory):
    """Return a small pack for sm_90, of which each launch was checked."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a real driver")
    if "llmos_kernels._C" not in sys.modules:
        pytest.skip("needs the C++ extension")
    folder = tmp_path_factory.mktemp("pack")
    *_, last = session("launches", "sm_90", driver, folder, script="pack_driver.py")
    variants, kernels = int(last.split()[0]), int(last.split()[3])
    assert variants > kernels > 20
    return folder


def test_launches(folder):
    index = kernel_pack.read_index(folder / "sm_90.json")
    assert index["triton"] == importlib.metadata.version("triton")
    listed = [v for variants in index["kernels"].values() for v in variants]
    assert any(v["descriptors"] for v in listed) and any(v["shared"] > 48 << 10 for v in listed)
    # The cubins contain no path of this machine.
    pack = kernel_pack.Pack(folder / "sm_90.json")
    assert not any(b".py" in pack.cubin(v) for v in listed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_bits_as_triton(tmp_path):
    *_, last = session("bits", tmp_path)
    assert int(last.split()[0]) > 20


def test_what_a_launch_refuses(folder, driver):
    pointer, other, extra_parameter, image, threads = session(
        "refused", "sm_90", driver, folder, script="pack_driver.py"
    )
    assert pointer == "ValueError: _sum_kernel: a tensor that is not on the GPU"
    assert other.startswith("Unusable: the cubin of _sum_kernel has other parameters")
    assert extra_parameter == other, "a parameter more"
    assert image.startswith("Unusable: cuModuleLoadData failed for _sum_kernel: device kernel")
    assert threads == "800 launches by 8 threads"


def test_no_driver(folder):
    """Without libcuda.so.1 the import works, and a launch that requires the pack raises."""
    (line,) = session("undriven", "sm_90", folder, script="pack_driver.py", LLMOS_PACK="require")
    assert line.startswith("Unusable: no CUDA driver: libcuda.so.1")


def test_triton_cannot_compile():
    """After a full disk Triton is tried again, after a missing compiler not; others are raised."""
    assert session("unready") == [
        "Triton cannot compile: [Errno 28] No space left",
        "raised: ours",
        *["Triton cannot compile: Failed to find C compiler. Please"] * 2,
    ]


def test_tuned_kernels_are_packed(tmp_path):
    """The pack has the tuned kernels of every GPU that runs the code of an architecture."""
    (before,) = session("tuned", "sm_80", "sm_90")
    entry = {"dtype": "bfloat16", "shape": [1024], "settings": {"ROWS": 1, "num_warps": 2}}
    about = {"format": 1, "gpu": "Test GPU", "arch": "sm_86"}
    (tmp_path / "a.json").write_text(json.dumps(about | {"settings": {"int8_norm": [entry]}}))
    (after,) = session("tuned", "sm_80", "sm_90", LLMOS_TUNED=str(tmp_path))
    before, after = json.loads(before), json.loads(after)
    assert after["sm_90"] == before["sm_90"] and after["sm_80"] > before["sm_80"]


@pytest.fixture
def copied(folder, tmp_path, monkeypatch):
    """Return the index of a copy of the pack, which takes the place of this build's."""
    shutil.copytree(folder, tmp_path / "pack")
    monkeypatch.setattr(kernel_pack, "FOLDER", tmp_path / "pack")
    monkeypatch.setattr(kernel_pack, "arch_of", lambda device: "sm_90")
    kernel_pack.opened.cache_clear()
    kernel_pack.opened_or_warned.cache_clear()
    kernel_pack._warned.clear()
    yield tmp_path / "pack" / "sm_90.json"
    kernel_pack.opened.cache_clear()
    kernel_pack.opened_or_warned.cache_clear()


def edited(path, stated=True, **changes):
    index = json.loads(path.read_text()) | changes
    if stated:
        index["sha256"] = kernel_pack.index_sum(index)
    path.write_text(json.dumps(index))


BAD = {
    "not JSON": (lambda p: p.write_text("{"), "sm_90.json: Expecting"),
    "a list": (lambda p: p.write_text("[]"), "sm_90.json: has format None, expected 1"),
    "another format": (lambda p: edited(p, format=2), "sm_90.json: has format 2, expected 1"),
    "damaged": (lambda p: edited(p, False, bytes=7), "sm_90.json: damaged"),
    "another GPU's": (lambda p: edited(p, arch="sm_80"), "sm_90.json: holds kernels for sm_80"),
    "other sources": (
        lambda p: edited(p, sources="0"),
        "sm_90.json: was built from other kernel sources",
    ),
    "truncated": (lambda p: os.truncate(p.with_suffix(".bin"), 9), "sm_90.bin: 9 bytes, expected"),
    "no cubins": (lambda p: p.with_suffix(".bin").unlink(), "sm_90.bin"),
    "unreadable": (lambda p: (p.unlink(), p.mkdir()), "sm_90.json: .*Is a directory"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_pack(copied, kind, monkeypatch):
    """A bad pack raises an error that names the file if required, and otherwise warns once."""
    spoil, words = BAD[kind]
    spoil(copied)
    monkeypatch.setattr(kernel_pack, "MODE", "require")
    with pytest.raises(kernel_pack.PackError, match=words):
        kernel_pack.for_device(0)
    monkeypatch.setattr(kernel_pack, "MODE", "auto")
    monkeypatch.setattr(kernel_pack, "PROVED", frozenset({"sm_90"}))
    with pytest.warns(RuntimeWarning, match=f"{words}.*Triton compiles kernels instead"):
        assert kernel_pack.for_device(0) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_pack.for_device(0) is None
    assert "cannot be used: " in kernel_pack.state()


def test_damaged_cubins(copied):
    pack = kernel_pack.Pack(copied)
    ((first, *_), *_) = pack.index["kernels"].values()
    blob = bytearray(copied.with_suffix(".bin").read_bytes())
    for at in (first["offset"] + 20, first["offset"] + first["length"] - 1):
        spoiled = blob[:]
        spoiled[at] ^= 1
        copied.with_suffix(".bin").write_bytes(spoiled)
        with pytest.raises(kernel_pack.PackError, match=r"sm_90\.bin"):
            pack.cubin(first)


def test_modes(copied, monkeypatch):
    """``auto`` uses the pack on proved architectures, ``require`` on all, ``off`` on none."""
    monkeypatch.setattr(kernel_pack, "PROVED", frozenset())
    monkeypatch.setattr(kernel_pack, "MODE", "auto")
    assert kernel_pack.for_device(0) is None
    assert kernel_pack.state().endswith("LLMOS_PACK=auto: not used")
    monkeypatch.setattr(kernel_pack, "MODE", "on")
    assert kernel_pack.for_device(0).path == copied
    monkeypatch.setattr(kernel_pack, "MODE", "auto")
    monkeypatch.setattr(kernel_pack, "PROVED", frozenset({"sm_90"}))
    assert kernel_pack.for_device(0).path == copied
    assert kernel_pack.state().endswith("LLMOS_PACK=auto: used on sm_90")
    monkeypatch.setattr(kernel_pack, "MODE", "off")
    assert kernel_pack.for_device(0) is None
    monkeypatch.setattr(kernel_pack, "MODE", "require")
    assert "sm_90.json has no a:b for key" in kernel_pack.missing(0, "a:b", "key")
    monkeypatch.setattr(kernel_pack, "arch_of", lambda device: "sm_75")
    with pytest.raises(kernel_pack.PackError, match="no kernels for sm_75, only for sm_90"):
        kernel_pack.for_device(0)
    with pytest.raises(ValueError, match="LLMOS_PACK must be off, auto, on or require, got 'yes'"):
        kernel_pack.check_mode("yes")


def test_which_gpu_runs_which_code(tmp_path, monkeypatch):
    """Only code for 8.x also runs on other architectures."""
    monkeypatch.setattr(kernel_pack, "FOLDER", tmp_path)
    assert kernel_pack.covering("sm_90") is None and kernel_pack.state() == "none in this build"
    for name in ("sm_80", "sm_90", "sm_100", "sm_120"):
        (tmp_path / f"{name}.json").touch()
    assert kernel_pack.archs() == ["sm_80", "sm_90", "sm_100", "sm_120"]
    covered = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100"}
    assert {arch: kernel_pack.covering(arch) for arch in covered} == covered
    assert not any(map(kernel_pack.covering, ("sm_75", "sm_103", "sm_110", "sm_121")))


def test_gpus_to_compile_for():
    (line,) = session("gpus", "8.0 8.6 8.9 9.0a 10.0 12.0+PTX", "8.9", "7.5 8.6", "9")
    assert json.loads(line) == [
        ["sm_80", "sm_90", "sm_100", "sm_120"],
        ["sm_89"],
        ["sm_86"],
        "expected GPUs like 8.0, 9.0a or 12.0+PTX, got '9'",
    ]


def test_the_reference_answers_where_nothing_compiles(monkeypatch):
    """On a GPU without a C compiler the reference runs, after one warning."""

    def launch(*args):
        raise registry.CannotCompile("Triton cannot compile: no C compiler")

    op = registry.Op(lambda x: x + 1, "norm.layer_norm:forward")
    monkeypatch.setitem(op.__dict__, "launch", launch)
    monkeypatch.setattr(torch.cuda, "device_of", contextlib.nullcontext)
    registry._warn_of_reference.cache_clear()
    on_device = registry._on_device(op)
    with pytest.warns(RuntimeWarning, match="no C compiler; the slow reference answers on CUDA"):
        assert on_device(torch.ones(1)).item() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_device(torch.ones(1)).item() == 2
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert on_device(torch.ones(1)).item() == 2
    registry._warn_of_reference.cache_clear()


def test_env_tells_of_the_pack(copied, monkeypatch):
    monkeypatch.setattr(kernel_pack, "MODE", "auto")
    assert any(line.startswith("pack          sm_90, ") for line in environment.describe())
    monkeypatch.setenv("CC", "/some/gcc")
    assert environment.triton_kernels("sm_90") == (
        "Triton kernels: not from the pack, compiled when first used, with gcc"
    )
    assert "the pack has none for sm_75, compiled" in environment.triton_kernels("sm_75")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    answer = "and there is no C compiler; the slow reference answers"
    assert environment.triton_kernels("sm_75").endswith(answer)
    monkeypatch.setattr(kernel_pack, "MODE", "require")
    assert environment.triton_kernels("sm_90").endswith("from the pack, for sm_90; others raise")
    assert "none, LLMOS_PACK=require and" in environment.triton_kernels("sm_75")
    monkeypatch.setattr(kernel_pack, "MODE", "on")
    assert "others compiled when first used" in environment.triton_kernels("sm_90")
    monkeypatch.setattr(environment, "HAS_TRITON", False)
    assert "Triton is not installed" in environment.triton_kernels("sm_90")
