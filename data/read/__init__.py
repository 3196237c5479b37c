"""Rows by number from shards, local or remote, and from token files in place.

May import: errors, tokenizer, format, storage, sources.
"""
