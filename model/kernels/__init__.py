"""The relation divergence as Triton kernels (model/loss/dispatch.py decides when they are used), and dropout on a CPU.

May import: errors.
"""
