"""The relation divergence as Triton kernels. When they are used is decided in `loss`.

May import: errors.
"""
