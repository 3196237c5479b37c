"""What MLflow is told, and its registry; the only room that imports MLflow.

May import: errors, system, stage.
"""
