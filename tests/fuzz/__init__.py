"""Damaged and odd inputs by the thousand, through preparation and loading (`python -m tests.fuzz --help`).

No input may crash them, stall them or fool them: every row that goes in comes out as a sample or as a reject, rows
that nobody touched come out as they were, and a sample of a damaged folder is the one that was written, or none.
"""
