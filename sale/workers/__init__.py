"""Long-running processes beside the API: ledger writer, scheduler, and who supervises them."""
