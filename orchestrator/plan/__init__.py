"""What a stage will cost, before anything runs.

May import: errors, system, recipe, resolve.
"""
