"""One file a verb, its parser beside its function: arguments in, one call, text out.

May import: every room.
"""
