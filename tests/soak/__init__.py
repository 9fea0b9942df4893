"""The soak: random load, operators and faults from a seed; a judge checks all answers."""
