"""The demo's task, tokenizer and tiny models: two-digit addition with a written-out derivation."""
