"""The method of the paper in pure functions and small frozen dataclasses. Needs torch only."""
