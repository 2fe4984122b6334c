"""Compile a Triton kernel for a GPU that is not here, and read what came out."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "cuda80": GPUTarget("cuda", 80, 32),
    "cuda90": GPUTarget("cuda", 90, 32),
    "cuda100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory a block may use. Triton does not fail beyond it: the launch would.
SHARED_LIMIT = {"cuda80": 166912, "cuda90": 232448, "cuda100": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says about one kernel on one target."""

    shared: int
    registers: int
    spills: int
    assembly: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{re.escape(instruction)}", self.assembly))


def compile_kernel(
    kernel, signature: dict[str, str], constants: dict, target: str, divisible=(), **options
) -> Compiled:
    """signature: argument -> type ("*fp32", "i32", "constexpr"); divisible: arguments that are multiples of 16."""
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=TARGETS[target], options=options)
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        number = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        spills = number["vgpr_spill_count"] + number["sgpr_spill_count"]
        return Compiled(built.metadata.shared, number["vgpr_count"], spills, text)
    return _read_cubin(built.asm["cubin"], built.metadata.shared)


@cache
def _tools() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _read_cubin(cubin: bytes, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = run(str(_tools() / "cuobjdump"), "-res-usage")
        assembly = run(str(_tools() / "nvdisasm"), "-c")
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    local = int(re.search(r"LOCAL:(\d+)", usage).group(1)) + int(re.search(r"STACK:(\d+)", usage).group(1))
    spills = local + len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return Compiled(shared, registers, spills, assembly)
