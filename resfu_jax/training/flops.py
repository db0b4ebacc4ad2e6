"""How many operations a function takes, counted on its trace: nothing is compiled."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resfu_jax.training.config import Config
from resfu_jax.training.devices import Layout, peak_flops

# One operation for each value of the result.
_ELEMENTWISE = frozenset(
    "add add_any sub mul div rem max min neg abs sign floor ceil round exp exp2 expm1 log log1p "
    "tanh logistic sin cos sqrt rsqrt cbrt pow integer_pow square erf erf_inv select_n "
    "clamp".split()
)
# One for each value of the argument.
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod argmax argmin cumsum cumprod "
    "cummax cummin".split()
)


def count_flops(function: Callable, *args: Any) -> float:
    """Floating-point operations of a call.

    Products count two operations per term, element-wise arithmetic and sums one per value, and the
    body of a loop as often as it runs (once, if that is only known when it runs). Of a condition,
    the largest branch counts; but where an op has a form for each platform, the smallest: the
    operations that the formula needs, so that the count is the same on every machine.

    Args:
      function: traced once for this.
      *args: arrays or `jax.ShapeDtypeStruct`s, of known sizes.
    """
    return _of_program(jax.make_jaxpr(function)(*args).jaxpr)


def count_step_flops(
    train_step: Callable, state: Any, batch: dict[str, Any], config: Config, layout: Layout
) -> tuple[float | None, float | None]:
    """Operations of a training step, and which share of the devices' peak one a second would be.

    Both are None if the peak is not known: there is nothing to compare with, and to count takes
    seconds.

    Args:
      train_step: of state and batch.
      state: shapes and types.
      batch: of this process; only its shapes count.
      config: may have the peak.
      layout: of the batch.
    """
    peak = peak_flops(config.parallel)
    if peak is None:
        return None, None
    whole = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *x.shape[1:]), x.dtype, sharding=layout.over_batch
        )
        for name, x in batch.items()
    }
    flops = count_flops(train_step, state, whole)
    return flops, flops / peak


def _of_program(program: Any) -> float:
    total = 0.0
    for equation in program.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            total += max(_of_program(branch.jaxpr) for branch in params["branches"])
            continue
        if name == "form":  # of an op, by platform (`ops/_forms.py`), not traced before
            shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
            forms = {form for _, form in params["branches"]}
            total += min(_of_program(jax.make_jaxpr(form)(*shapes).jaxpr) for form in forms)
            continue
        inner = sum(map(_of_program, _programs_of(params)))
        if name == "scan":
            inner *= params["length"]
        elif name == "shard_map":
            inner *= params["mesh"].size
        elif name == "pallas_call":
            inner *= math.prod(params["grid_mapping"].grid)
        total += inner + _of_equation(equation)
    return total


def _programs_of(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    result = equation.outvars[0].aval if equation.outvars else None
    if result is None or not jnp.issubdtype(getattr(result, "dtype", np.int32), jnp.floating):
        return 0.0
    out = math.prod(result.shape)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * out * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out * math.prod(kernel) / outputs
    if name in _ELEMENTWISE:
        return float(out)
    if name in _REDUCTIONS:
        return float(math.prod(equation.invars[0].aval.shape))
    if name == "scatter-add":
        return float(math.prod(equation.invars[2].aval.shape))
    return 0.0
