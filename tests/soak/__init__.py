"""The soak: random load, operators and faults from a seed, judged by what clients were told."""
