"""Teacher scores for rollouts, from one or several teachers."""
