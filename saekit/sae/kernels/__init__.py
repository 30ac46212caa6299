"""The two operations that training an SAE spends its time in, each as a readable oracle and as a fast path.

`eager` is plain autograd over the formulas; `sparse` computes the same values and gradients without the dense
`[N, M]` and `[N, K, D]` tensors that plain autograd makes in its backward pass. Tests hold the two together.
"""
