"""torch.compile does not look inside the public operations: it breaks the graph around them, and they run as ever."""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_disabled = cache(torch.compiler.disable)


def opaque(function: Function) -> Function:
    """function, which torch.compile calls but does not trace. torch.compiler.disable itself would import the compiler
    (3 s) into every program; where it has not been imported, nobody compiles."""

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        chosen = _disabled(function) if "torch._dynamo" in sys.modules else function
        return chosen(*arguments, **keywords)

    return cast(Function, call)
