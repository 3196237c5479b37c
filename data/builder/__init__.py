"""Sources into shards, in parallel and resumable.

May import: errors, tokenizer, format, storage, sources.
"""
