"""What the machine gives: atomic files, processes, signals, the lease, timers, text. Knows nothing of training.

May import: errors.
"""
