"""Encoders of every family, tapped at queries, keys and values.

May import: errors, files.
"""
