"""Measurements, which nothing else imports.

May import: every room but launch, tracking and verbs.
"""
