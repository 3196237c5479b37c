"""The bytes of one text file into records, strictly: JSON, CSV, tables, lines; and which field of them is the text.

May import: errors.
"""
