"""Evaluation: errors, tables, reports, submissions, speed."""
