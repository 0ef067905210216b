"""Scores of answers and the uncertainty of their means; pure Python, so that every stack and the driver may use it."""
