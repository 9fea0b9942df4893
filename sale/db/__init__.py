"""PostgreSQL: the ledger made readable, the roster, the accounts."""
