"""The fused loss core: row statistics and gradients of vocabulary-parallel logits, in every mode."""
