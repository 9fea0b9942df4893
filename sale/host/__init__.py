"""Processes and servers of one machine: what `sale up` runs."""
