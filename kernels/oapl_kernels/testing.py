"""What tests and benchmarks see of the kernels' insides, and nothing that the kernels need.

LAUNCHES   how often each Triton kernel was launched
FUNCTIONS  what the custom ops run, by name
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHES: Counter[str] = Counter()
FUNCTIONS: dict[str, Callable[..., Any]] = {}
LIBRARY_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, also inside the custom ops."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run function and count it; a custom op other than `product` is counted by what it runs."""
        keywords = kwargs or {}
        if function.namespace == "oapl_kernels" and function._opname != "product":
            with self:
                return FUNCTIONS[function._opname](*args, **keywords)
        if function._opname == "product":
            self._count(*args[:2])
        elif function.overloadpacket._qualified_op_name in LIBRARY_PRODUCTS:
            self._count(*args[-2:])
        return function(*args, **keywords)

    def _count(self, left: Any, right: Any) -> None:
        self.flops += 2 * math.prod(left.shape) * right.shape[-1]
