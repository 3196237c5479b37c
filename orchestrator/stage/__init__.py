"""One stage as values and as files: the contract between driver and workers. Does nothing by itself.

May import: nothing of the orchestrator.
"""
