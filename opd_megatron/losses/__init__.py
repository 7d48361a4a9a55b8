"""What is minimised: pure torch, process groups are arguments. Formulas: docs/losses.md."""
