"""What torch.compile sees of this package: custom ops, one node each, or a break of the graph."""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch

from .testing import FUNCTIONS

Function = TypeVar("Function", bound=Callable[..., Any])

LIBRARY = torch.library.Library("oapl_kernels", "DEF")
_disabled = cache(torch.compiler.disable)


def operation(
    fake: Callable[..., Any],
    *,
    mutates: tuple[str, ...] = (),
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[Function], Function]:
    """torch.ops.oapl_kernels.NAME from an annotated function NAME; fake makes results of the right shape and dtype.

    save(ctx, inputs, output) and backward are its formula; without one, backward raises. torch.library.custom_op would
    do the same, but imports the compiler (3 s) at its first call.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        FUNCTIONS[name] = function
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"oapl_kernels::{name}", fake, lib=LIBRARY)
        if not mutates:
            formula = cast(Callable[..., Any], backward)
            torch.library.register_autograd(f"oapl_kernels::{name}", formula, setup_context=save, lib=LIBRARY)
        return cast(Function, getattr(torch.ops.oapl_kernels, name).default)

    return register


def return_nothing(*arguments: Any) -> None:
    """Fake result of an operation that only changes its arguments."""


def opaque(function: Function) -> Function:
    """function, which torch.compile calls but does not trace. torch.compiler.disable itself would import the compiler
    into every program; where it has not been imported, nothing is compiled."""

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        chosen = _disabled(function) if "torch._dynamo" in sys.modules else function
        return chosen(*arguments, **keywords)

    return cast(Function, call)
