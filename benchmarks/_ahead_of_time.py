"""Our Triton kernels and those of others, compiled for GPUs that are not here: what came out, side by side."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from oapl_kernels import epilogue_triton, scoring_triton, sequence_triton, weight_pack_triton
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

    @property
    def instructions(self) -> int:
        """In the binary, loops counted once."""
        return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/|^\t[sv]_\w+|^\t(?:ds|global|buffer)_\w+", self.assembly, re.M))

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
            return subprocess.run([*command, file.name], capture_output=True, encoding="utf-8", check=True).stdout

        usage = run(str(_tools() / "cuobjdump"), "-res-usage")
        assembly = run(str(_tools() / "nvdisasm"), "-c")
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    local = int(re.search(r"LOCAL:(\d+)", usage).group(1)) + int(re.search(r"STACK:(\d+)", usage).group(1))
    spills = local + len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return Compiled(shared, registers, spills, assembly)


EPILOGUE = {"vocabulary": "i32", "stride": "i32"}
FLOATS = {"inverse_temperature": "fp32", "softcap": "fp32"}


def row_statistics(target, cap):
    pointers = {"logits": "*fp32", "target": "*i64", "out": "*fp32"}
    constants = {"BLOCK": epilogue_triton.BLOCK, "CAP": cap}
    signature = pointers | EPILOGUE | {"out_stride": "i32"} | FLOATS | dict.fromkeys(constants, "constexpr")
    divisible = [*pointers, *EPILOGUE]
    options = {"num_warps": epilogue_triton.WARPS}
    return compile_kernel(epilogue_triton.row_statistics, signature, constants, target, divisible, **options)


def row_gradient(target, cap, entropy, dtype):
    pointers = {"logits": "*fp32", "gradient": dtype, "target": "*i64", "stats": "*fp32"}
    pointers |= {"coefficient": "*fp32", "entropy_coefficient": "*fp32"}
    constants = {"BLOCK": epilogue_triton.BLOCK, "CAP": cap, "ENTROPY": entropy, "INTERPRETED": False}
    strides = EPILOGUE | {"gradient_stride": "i32"}
    signature = pointers | strides | {"stats_stride": "i32"} | FLOATS | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": epilogue_triton.WARPS}
    return compile_kernel(epilogue_triton.row_gradient, signature, constants, target, [*pointers, *strides], **options)


def score_tile(target, dtype="*bf16", warps=None):
    pointers = {"hidden": dtype, "weight": dtype, "bias": "*fp32", "target": "*i64", "partial": "*fp32"}
    pointers |= {"chosen": "*fp32"}
    sizes = {"tokens": "i32", "depth": "i32", "vocabulary": "i32", "hidden_stride": "i32", "weight_stride": "i32"}
    constants = {name: getattr(scoring_triton, name) for name in ("TOKENS", "VOCABULARY", "DEPTH", "GROUP")}
    constants |= {"DIVIDES": True, "BIAS": False, "CAP": False, "WIDEN": False}
    signature = pointers | sizes | FLOATS | dict.fromkeys(constants, "constexpr")
    stages = 2 if target.startswith("gfx") else 3
    options = {"num_warps": warps or scoring_triton.WARPS, "num_stages": stages}
    divisible = [*pointers, *sizes]
    return compile_kernel(scoring_triton.score_tile, signature, constants, target, divisible, **options)


def sum_sequence(target):
    pointers = {"values": "*fp32", "offsets": "*i64", "mask": "*u8", "sums": "*fp32"}
    constants = {"BLOCK": sequence_triton.BLOCK, "MASKED": True}
    signature = pointers | dict.fromkeys(constants, "constexpr")
    return compile_kernel(
        sequence_triton.sum_sequence, signature, constants, target, list(pointers), num_warps=sequence_triton.WARPS
    )


def pack_block(target, dtype="*bf16"):
    pointers = {"source": "*fp32", "payload": dtype, "digest": "*i32"}
    constants = {"BLOCK": weight_pack_triton.BLOCK, "INTERPRETED": False}
    signature = pointers | {"count": "i32", "words": "i32"} | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": weight_pack_triton.WARPS}
    return compile_kernel(weight_pack_triton.pack_block, signature, constants, target, list(pointers), **options)


SHIPPED = {
    "weight-pack-bf16": pack_block,
    "weight-pack-fp32": lambda target: pack_block(target, "*fp32"),
    "score-bf16": score_tile,
    "score-fp16": lambda target: score_tile(target, "*fp16"),
    "sequence-sum": sum_sequence,
    "statistics": lambda target: row_statistics(target, False),
    "statistics-softcap": lambda target: row_statistics(target, True),
    "gradient-bf16": lambda target: row_gradient(target, False, False, "*bf16"),
    "gradient-fp32": lambda target: row_gradient(target, False, False, "*fp32"),
    "gradient-bf16-softcap-entropy": lambda target: row_gradient(target, True, True, "*bf16"),
}


def _with_constants(kernel, pointers, sizes, constants, target, **options):
    """Arguments of a kernel in their order; those in none of the three are None."""
    names = getattr(kernel, "arg_names", None) or kernel.fn.arg_names
    none = dict.fromkeys(set(names) - {*pointers, *sizes, *constants})
    constants = constants | none
    kinds = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in names}
    return compile_kernel(kernel, signature, constants, target, [*pointers, *sizes], **options)


def liger_cross_entropy(target):
    """The epilogue of Liger's fused linear cross-entropy at V=151936: bf16 logits, gradient in place."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    pointers = {"X_ptr": "*bf16", "Y_ptr": "*i64", "loss_ptr": "*fp32"}
    sizes = ["X_stride", "n_cols", "n_non_ignore", "ignore_index"]
    constants = {"Y_stride": 1, "loss_stride": 1, "token_accuracy_stride": 0, "predicted_tokens_stride": 0}
    constants |= {"sum_non_ignore_weight": 0.0, "weight_sum": 0.0, "lse_square_scale": 0.0, "label_smoothing": 0.0}
    constants |= {"reduction": "none", "RETURN_Z_LOSS": False, "RETURN_TOKEN_ACCURACY": False, "HAS_WEIGHT": False}
    constants |= {"RETURN_PREDICTED_TOKENS": False, "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True}
    options = {"num_warps": 16 if target.startswith("gfx") else 32}
    constants |= {"BLOCK_SIZE": 32768}
    return _with_constants(liger_cross_entropy_kernel, pointers, sizes, constants, target, **options)


def _plain(kernel):
    """The kernel inside cut-cross-entropy's layers of heuristics, and its configuration."""
    values = {}
    while hasattr(kernel, "values") or hasattr(kernel, "configs"):
        if hasattr(kernel, "values"):
            values |= {k: f({}) for k, f in kernel.values.items() if k in CUT_CONFIGURATION}
        kernel = kernel.fn
    return kernel, values


CUT_CONFIGURATION = ("BLOCK_B", "BLOCK_V", "BLOCK_D", "num_warps", "num_stages")


def cut_forward(target):
    """cut-cross-entropy's log-sum-exp without logits."""
    from cut_cross_entropy.cce_lse_forward import _cce_lse_forward_kernel

    kernel, options = _plain(_cce_lse_forward_kernel)
    pointers = {"E": "*bf16", "C": "*bf16", "LSE": "*fp32", "Locks": "*i32"}
    sizes = ["B", "V", "D", "stride_eb", "stride_cv", "num_locks", "B_BIN"]
    constants = {"stride_ed": 1, "stride_cd": 1, "stride_lse_b": 1, "stride_vb": 0, "HAS_VALIDS": False}
    constants |= {"GROUP_B": 8, "EVEN_D": True, "HAS_SOFTCAP": False, "HAS_LA": False, "DOT_PRECISION": "ieee"}
    constants |= {name: options.pop(name) for name in CUT_CONFIGURATION[:3]}
    return _with_constants(kernel, pointers, sizes, constants, target, **options)


def cut_backward(target):
    """cut-cross-entropy's backward, which computes the logits again."""
    from cut_cross_entropy.cce_backward import _cce_backward_kernel

    kernel, options = _plain(_cce_backward_kernel)
    pointers = {"E": "*bf16", "C": "*bf16", "LSE": "*fp32", "dOut": "*fp32", "Targets": "*i64", "dE": "*bf16"}
    pointers |= {"dELocks": "*i32", "dC": "*bf16", "dCLocks": "*i32"}
    sizes = ["B", "D", "V", "n_de_locks_0", "n_de_locks_1", "n_dc_locks_0", "n_dc_locks_1"]
    sizes += ["stride_eb", "stride_cv", "B_BIN"]
    constants = {"grad_scale": 1.0, "stride_ed": 1, "stride_cd": 1, "stride_vb": 0, "GROUP_B": 8, "EVEN_D": True}
    constants |= {"MM_BACK_BLOCK_D": 2 * options["BLOCK_D"], "MM_BACK_EVEN_D": True, "ITEM_DO": False}
    constants |= {"HAS_VALIDS": False, "HAS_VOCAB_ORDERING": False, "FILTER_GRAD": False, "HAS_TARGETS": True}
    constants |= {"HAS_SOFTCAP": False, "SHIFT": False, "REQUIRES_GRAD": True}
    constants |= {name: options.pop(name) for name in CUT_CONFIGURATION[:3]}
    return _with_constants(kernel, pointers, sizes, constants, target, **options)


SIDE_BY_SIDE = {
    "ours, statistics": SHIPPED["statistics"],
    "ours, gradient": SHIPPED["gradient-bf16"],
    "Liger cross-entropy": liger_cross_entropy,
    "ours, score": SHIPPED["score-bf16"],
    "cut-cross-entropy forward": cut_forward,
    "cut-cross-entropy backward": cut_backward,
}


def side_by_side() -> list[dict[str, object]]:
    """Registers, spills, shared memory and instructions of each kernel on each target, or why it did not compile."""
    rows: list[dict[str, object]] = []
    for name, build in SIDE_BY_SIDE.items():
        for target in TARGETS:
            row: dict[str, object] = {"kernel": name, "target": target}
            try:
                made = build(target)
            except Exception as error:  # another project's kernel, on this version of Triton
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            else:
                row |= {"registers": made.registers, "spills": made.spills, "shared": made.shared}
                row |= {"shared_limit": SHARED_LIMIT[target], "instructions": made.instructions}
            rows.append(row)
    return rows
