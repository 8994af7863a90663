"""Check Triton kernels on a machine without a GPU: run them in the interpreter, compile them ahead.

    interpreted("-m", "pytest", path)          the numbers, on the CPU, in a process of its own
    compile_for(kernel, ..., capability=90)    PTX and machine code, without a driver

Triton decides at import whether its functions are interpreted (`TRITON_INTERPRET=1`), so the two
can never share a process. The interpreter multiplies bfloat16 wrongly in `tl.dot` and truncates
instead of rounding to bfloat16 (triton 3.6 to 3.9): check with float16 and float32 there.

What the compiled form can show is whether a kernel asks for wide loads, whether its registers fit
and whether it reaches the tensor cores; how fast it is, it cannot.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit_kernels.launch import FUSED

if TYPE_CHECKING:
    from collections.abc import Mapping

WARP = 32
LOAD = re.compile(r"\bld\.(?:volatile\.|relaxed\.\w+\.)?global\S*|\bcp\.async\.c[ag]\.\S+[^;]*")


def interpreted(*arguments: str, timeout_seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` with Triton interpreting; the result holds stdout and stderr as one."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


@dataclass(frozen=True)
class Compiled:
    """A kernel as the compiler left it."""

    name: str
    ptx: str
    cubin: bytes
    metadata: Any
    """Triton's own: `num_warps`, `shared` (bytes), `target`."""

    @cached_property
    def resources(self) -> dict[str, int]:
        """What one thread or block takes: `REG`, and bytes of `STACK`, `SHARED`, `LOCAL`."""
        report = _tool("cuobjdump", "-res-usage", self.cubin)
        return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", report)}

    @cached_property
    def sass(self) -> str:
        """The machine code as text."""
        return _tool("nvdisasm", "-c", self.cubin)


def compile_for(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> Compiled:
    """Compile `fn`, a `triton.jit` function, for compute capability 80 or 90; 1 to 3 s, then cached.

    `signature` gives each run-time argument a type: `*fp16`, `*i32`, `fp32`, `i32`. Pointers count
    as aligned to 16 bytes and integers ending in `:16` (`i32:16`) as multiples of 16, which is what
    Triton finds out by itself at a launch; `*fp16:1` is a pointer of which nothing is known.

    Raises:
        RuntimeError: the kernel is interpreted, since Triton was imported that way.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile as triton_compile

    if type(fn).__name__ != "JITFunction":
        raise RuntimeError(
            "Triton was imported with TRITON_INTERPRET=1; compile in another process"
        )
    types = {name: kind.partition(":")[0] for name, kind in signature.items()}
    aligned = {
        (fn.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.endswith(":16") or (kind.startswith("*") and not kind.endswith(":1"))
    }
    types |= dict.fromkeys(constexprs, "constexpr")
    source = ASTSource(
        fn=fn,
        signature={name: types[name] for name in fn.arg_names},
        constexprs=dict(constexprs),
        attrs=aligned,
    )
    kernel = triton_compile(
        source,
        target=GPUTarget("cuda", capability, WARP),
        options={"num_warps": num_warps, "num_stages": num_stages, **FUSED, **options},
    )
    return Compiled(fn.__name__, kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata)


@dataclass(frozen=True)
class Loads:
    """Loads from global memory in a kernel's text, by bytes that one thread asks for at once."""

    sixteen: int
    eight: int
    four: int
    smaller: int

    @property
    def wide(self) -> int:
        """Loads of 8 bytes or more."""
        return self.sixteen + self.eight


def vector_loads(ptx: str) -> Loads:
    """Count `ld.global` and `cp.async` by width."""
    counts = {16: 0, 8: 0, 4: 0, 0: 0}
    for load in LOAD.findall(ptx):
        width = _width(load)
        counts[width if width in counts else 16 if width > 16 else 0] += 1
    return Loads(counts[16], counts[8], counts[4], counts[0])


def _width(load: str) -> int:
    if load.startswith("cp.async"):
        size = re.search(r"\],\s*(?:0x)?(\d+)", load)
        return int(size.group(1), 16 if "0x" in load else 10) if size else 16
    vector = re.search(r"\.v(\d)", load)
    bits = re.search(r"\.[busf](\d+)$", load)
    return (int(vector.group(1)) if vector else 1) * (int(bits.group(1)) if bits else 0) // 8


def spills(compiled: Compiled) -> int:
    """Bytes of memory a thread needs because its registers ran out; 0 is what we want."""
    used = compiled.resources
    return used.get("STACK", 0) + used.get("LOCAL", 0)


def tensor_cores(ptx: str) -> int:
    """Matrix instructions (`mma.sync` and `wgmma`) in a kernel's text."""
    return len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx))


def _tool(name: str, flag: str, cubin: bytes) -> str:
    """Run one of the CUDA tools that Triton's wheel brings along."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [str(program), flag, str(path)], capture_output=True, text=True, check=True
        ).stdout
