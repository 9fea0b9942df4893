"""Bytes, connections and load. Knows nothing of campaigns."""
