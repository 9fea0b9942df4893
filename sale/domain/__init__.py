"""The domain: plain data with its bounds, and no I/O."""
