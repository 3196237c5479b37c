"""The stages in order: prepare, launch, publish, sum up. Holds no training state.

May import: every room but bench and verbs.
"""
