"""What the engine sells while more is asked of it than it can do."""
