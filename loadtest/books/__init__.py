"""Compares the answers that clients got with the orders in PostgreSQL."""
