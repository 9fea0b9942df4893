"""A ticket flash-sale engine: never oversold, durable once answered, audited by anyone."""

__version__ = "0.2.0"
