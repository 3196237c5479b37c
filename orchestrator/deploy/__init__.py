"""A finished model made into what people deploy: another program's format, eight bits, a smaller vocabulary. Leaves out
training, and where a model comes from (`resolve/folders.py`).
"""
