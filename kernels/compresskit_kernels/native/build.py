"""Compile the C++ sources for this CPU, once, and load them.

The library is kept in the user's cache under a name made of the source, the compiler, its flags and
the CPU, so that neither an update nor a home directory shared between machines finds a wrong one.
It exports plain C functions and is loaded by ctypes: no torch headers, so it compiles in seconds
and a call costs about a microsecond.

`COMPRESSKIT_NATIVE=0` turns it off; `COMPRESSKIT_CACHE` moves the cache; `CXX` names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        "products.cpp",
        "attention.cpp",
        "coded_attention.cpp",
        "encode.cpp",
        "bare_attention.cpp",
        "bare_encode.cpp",
    )
)
HEADERS = tuple(
    Path(__file__).with_name(name)
    for name in ("vectors.h", "rows.h", "codes.h", "tiles.h", "coding.h", "bare.h")
)
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512vbmi", "avx512_bf16"})
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")
PATIENCE = 120
"""Seconds a compiler may take (measured: 17)."""


class Native:
    """The loaded library, or the reason why there is none."""

    def __init__(self, library: ctypes.CDLL | None, reason: str = "") -> None:
        """Declare the functions of `library`."""
        self.library = library
        self.reason = reason
        if library is not None:
            pointer, whole, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
            signatures = {
                "compresskit_product": (pointer, pointer, pointer, whole, short, short),
                "compresskit_spread": (pointer, whole, whole, pointer),
                "compresskit_lay_out": (pointer, whole, whole, short, pointer),
                "compresskit_attention": (pointer,),
                "compresskit_coded_attention": (pointer,),
                "compresskit_encode": (pointer,),
                "compresskit_bare_attention": (pointer,),
                "compresskit_bare_encode": (pointer,),
            }
            for name, arguments in signatures.items():
                function = getattr(library, name)
                function.argtypes = arguments
                function.restype = None


def available() -> bool:
    """Whether the products can run here; the first call compiles them."""
    return os.environ.get("COMPRESSKIT_NATIVE", "1") != "0" and load().library is not None


def reason() -> str:
    """Why `available` is false."""
    if os.environ.get("COMPRESSKIT_NATIVE", "1") == "0":
        return "turned off by COMPRESSKIT_NATIVE=0"
    return load().reason


@functools.cache
def load() -> Native:
    """Compile where needed and load."""
    missing = sorted(NEEDED - _flags())
    if missing:
        return Native(None, f"this CPU lacks {', '.join(missing)}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return Native(None, "no C++ compiler (g++ or clang++)")
    try:
        return Native(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        last = str(said).strip().splitlines()[-1:] if said else [str(error)]
        return Native(None, f"{compiler} failed: {' '.join(last)}")


def _compiled(compiler: str) -> Path:
    """Path of the library for this source, compiler and CPU."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True
    ).stdout.splitlines()[0]
    openmp = _openmp()
    what = "\0".join((version, *FLAGS, *sorted(_flags()), *openmp)).encode()
    sources = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    name = hashlib.sha256(sources + what).hexdigest()[:16]
    found = _cache() / f"native-{name}.so"
    if not found.exists():
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.parent) as folder:
            fresh = Path(folder) / found.name
            command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(fresh), *openmp]
            subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
            fresh.replace(found)  # atomic: two processes may compile at once
    return found


def _openmp() -> tuple[str, ...]:
    """Link torch's own OpenMP library, so that both share one pool of threads."""
    folder = Path(torch.__file__).parent / "lib"
    shipped = sorted(folder.glob("libgomp*.so*"))
    return (str(shipped[0]), f"-Wl,-rpath,{folder}") if shipped else ()


def _cache() -> Path:
    asked = os.environ.get("COMPRESSKIT_CACHE")
    return (Path(asked) if asked else Path.home() / ".cache" / "compresskit") / "native"


@functools.cache
def _flags() -> frozenset[str]:
    """Instruction sets of this CPU, empty where they are not known."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        return frozenset()
    for line in info.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
