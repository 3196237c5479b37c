"""A recipe's references become folders, and teacher, data and students are checked against each other.

May import: errors, system, stage, recipe, feed, tracking.
"""
