"""Which row comes when: numbers only, no files.

May import: errors.
"""
