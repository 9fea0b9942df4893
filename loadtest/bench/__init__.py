"""The benchmark: the engine as a share of what its HTTP stack can do, and beside its peers."""
