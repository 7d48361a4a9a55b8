"""Held-out evaluation: graders, mean@n accuracy, the exact KL to the teacher."""
