"""Where training an SAE spends its time, behind one switch: `eager`, `cpu`, `native`, `triton`.

`eager` is plain autograd over the formulas. The others compute the same values and gradients without the dense
`[N, M]` and `[N, K, D]` tensors that plain autograd makes; tests hold each of them to `eager`.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.sae.kernels.choose import (
    BACKENDS,
    SELECT_DTYPES,
    Kernels,
    auto_backend,
    check_select_dtype,
    choose_kernels,
    default_kernels,
    has_fast_bf16,
    has_fast_int8,
    likely_type,
    update_kernels,
)

__all__ = [
    "BACKENDS",
    "SELECT_DTYPES",
    "Kernels",
    "auto_backend",
    "check_select_dtype",
    "choose_kernels",
    "default_kernels",
    "has_fast_bf16",
    "has_fast_int8",
    "likely_type",
    "update_kernels",
]
