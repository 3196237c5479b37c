"""What data sets are made from: text, archives, token files of other programs. A plug-in adds one.

May import: errors, tokenizer, format, storage, records.
"""
