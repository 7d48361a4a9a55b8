"""New weights to the rollout servers, with proof that they hold them."""
