"""The operations that dominate an SAE's training time, in four backends: `eager`, `cpu`, `native`, `triton`.

`eager` is plain autograd over the formulas. The others compute the same values and gradients without the dense
`[N, M]` and `[N, K, D]` tensors of plain autograd. Tests compare each of them with `eager`.

Internal: may change in any release. The API is the names in `saekit`.
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
