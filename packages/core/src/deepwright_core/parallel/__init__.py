"""Parallelism that is applied to a model from outside: what a rank holds, and how ranks keep in step."""
