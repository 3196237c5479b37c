"""The objectives: which relations are compared, and how far apart they are.

May import: errors, encoder, kernels.
"""
