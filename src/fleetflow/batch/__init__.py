"""Many clips, many machines: each clip exactly once in effect, and on after any crash."""
