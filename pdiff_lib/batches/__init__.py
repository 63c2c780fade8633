"""Runs of notebooks, one by one or by the hundred; the `pdiff` command and the app."""
