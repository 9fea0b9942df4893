"""Use cases of operators: campaigns, accounts, the roster, rehearsals."""
