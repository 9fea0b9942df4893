"""What members want done; one use case a module."""
