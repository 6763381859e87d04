"""Networks outside of Python: files for other runtimes, the proof that they are equal, and prediction without torch."""
