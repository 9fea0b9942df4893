"""What the engine talks about: plain data with its bounds, and no I/O."""
