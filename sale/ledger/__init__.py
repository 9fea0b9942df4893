"""The ledger: kinds of events, the hash chain, and what the events add up to."""
