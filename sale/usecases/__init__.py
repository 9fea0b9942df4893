"""What members, operators and the engine itself want done; one purpose a module."""
