"""Remote stores, the cache, retries. Knows nothing of rows.

May import: errors, format.
"""
