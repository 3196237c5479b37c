"""Text into token rows, and rows by step, exact on any number of workers. Imports neither model nor orchestrator."""
