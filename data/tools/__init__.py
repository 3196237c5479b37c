"""What can be done with a built data set: verify, repair, convert, explain.

May import: everything of data but torch_dataset.
"""
