"""Use cases of members; one a module."""
