"""What operators want done: campaigns, accounts, the roster, rehearsals."""
