"""Runs code that a policy wrote, apart from this machine."""
