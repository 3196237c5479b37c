"""The rows of a stage, and the ledger kept of them. How rows lie on disk is `minilm.data`'s.

May import: errors, stage, train.
"""
