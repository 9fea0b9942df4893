"""Long-running processes other than the API: the ledger writer and the scheduler."""
