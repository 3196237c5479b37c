"""Workers onto machines: the only room of the orchestrator that imports Ray. What workers do is `worker`'s.

May import: errors, system, stage, checkpoint, worker.
"""
