"""Encoders, relations and their divergence. Imports neither data nor orchestrator."""
