"""Prompts: reading and refusing rows, chat templates, deterministic order, packing."""
