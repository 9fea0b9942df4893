"""What clients were told, against what stands in PostgreSQL."""
