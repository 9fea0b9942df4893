"""Long-running processes beside the API: ledger writer and scheduler."""
