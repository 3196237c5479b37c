"""The supervised loop of one stage on one worker. Knows neither Ray nor MLflow.

May import: errors, system, stage, train, feed, checkpoint.
"""
