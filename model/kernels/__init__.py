"""The relation divergence as Triton kernels. model/loss/dispatch.py decides when they are used.

May import: errors.
"""
