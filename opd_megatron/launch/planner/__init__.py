"""What a recipe needs and how long a step takes, from a stated model (docs/planner.md). No torch."""
