"""Product policies of other machines, and of files of measured times that tests make."""

import functools
import json

import torch

from llmos_kernels.ops import _cpu_facts, _product_measurements, _product_policy

HAS_ONEDNN = _cpu_facts.is_onednn_product(torch.bfloat16, True)
CACHED = (
    (_cpu_facts, "is_onednn_product"),
    (_product_measurements, "tables"),
    (_product_measurements, "_nearest"),
    (_product_policy, "_entries"),
    (_product_policy, "_table"),
    (_product_policy, "_answer"),
    (_product_policy, "_are_ours"),
)


def anew(monkeypatch, folder=None):
    """Forget what the policy read and answered, for this test.

    It then reads the measured times in ``folder``, a user's folder with settings, or none at all.
    The rules stay those of the package.
    """
    for module, name in CACHED:
        fresh = functools.lru_cache(getattr(module, name).__wrapped__)
        monkeypatch.setattr(module, name, fresh)
    folders = [folder] if folder else []
    monkeypatch.setattr(_product_measurements, "folders", lambda: folders)


def pretend(monkeypatch, isa, amx=False, intel=False, onednn=HAS_ONEDNN):
    """Choose by rules, as on a CPU with that ISA for our kernels, with AMX for oneDNN, of Intel's.

    ``onednn`` says whether it computes torch's products of bfloat16.
    """
    known = _cpu_facts.Cpu(
        "GenuineIntel" if intel else "AuthenticAMD",
        None,
        isa,
        amx,
        "AVX512",
        torch.backends.mkl.is_available(),
    )
    anew(monkeypatch)
    for module in (_cpu_facts, _product_policy):
        monkeypatch.setattr(module, "cpu", lambda: known)
    told = functools.cache(lambda dtype, enabled: onednn and dtype == torch.bfloat16)
    monkeypatch.setattr(_cpu_facts, "is_onednn_product", told)


def here(**changes):
    """Return what a file says of this machine, with ``changes``."""
    facts = _cpu_facts.cpu()._asdict() | {"threads": torch.get_num_threads()} | changes
    return {name: facts[name] for name in _product_measurements.FACTS}


def content(products, **changes):
    """Return a file of measured times for this machine, with ``changes`` to its facts.

    ``products`` are (direction, dtype, library, points).
    """
    names = "direction", "dtype", "torch_library", "points"
    return {
        "format": 1,
        "machine": here(**changes),
        "date": "2026-01-02",
        "commit": "commit 0123456789ab",
        "products": [dict(zip(names, grid, strict=True)) for grid in products],
    }


def put(folder, name, products, **changes):
    """Write a file of measured times into a user's folder with settings, and return its path."""
    path = folder / "cpu" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content(products, **changes)))
    return path
