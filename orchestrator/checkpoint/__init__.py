"""The state between two steps, whole or absent, in a folder or a bucket. When to save is the worker's affair.

May import: errors, system, stage, train.
"""
