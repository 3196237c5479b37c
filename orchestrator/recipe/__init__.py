"""YAML into frozen types, or everything that is wrong with it. Opens no model and no data set.

May import: errors, stage.
"""
