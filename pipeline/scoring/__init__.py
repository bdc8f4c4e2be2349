"""Judging answers: which are right, and what the counts mean."""
