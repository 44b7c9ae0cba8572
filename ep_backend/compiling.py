"""Exchanges in graphs that Inductor compiles, in their order.

Inductor (of PyTorch 2.11, 2.13 and 2.14) notes which operator with effects comes behind which under the name
of a buffer, and looks for the name of an operation (pytorch/pytorch#188301). So it may move one in front of
another, and where ranks' sizes differ, on one rank alone: then each waits for the other in another exchange.
Here the same is noted under the name that is looked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary


@cache
def keep_order(operators: tuple[Any, ...]) -> bool:
    """Of the calls of ``operators``, all of them together, in every graph that is compiled from now on.
    Returns False if this PyTorch lacks what that takes, which no release promises to keep."""
    try:  # takes seconds, and only who compiles needs it
        from torch._inductor import ir
        from torch._inductor.lowering import fallback_handler, register_lowering
        from torch._inductor.virtualized import V
    except ImportError:
        return False

    last: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # of each graph, the result of the call before

    def keep(operator: Any) -> None:
        call = fallback_handler(operator, add_to_fallback_set=False)

        @register_lowering(operator, type_promotion_kind=None)
        def lower(*args: Any, **kwargs: Any) -> Any:
            graph = V.graph
            known = len(graph.operations)
            results = call(*args, **kwargs)
            kernel = next(made for made in graph.operations[known:] if isinstance(made, ir.FallbackKernel))
            if graph in last:
                graph.additional_buffer_deps[kernel.get_operation_name()].add(last[graph])
            last[graph] = kernel.get_name()
            return results

    for operator in operators:
        keep(operator)
    return True
