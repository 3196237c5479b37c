"""One update: micro-batches into gradients into AdamW. Knows no file and no checkpoint.

May import: errors, stage.
"""
