"""Text environments: who answers the student in a conversation of several turns."""
