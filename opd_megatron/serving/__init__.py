"""SGLang servers: how one is started, what may be asked of it, and what its answers must be."""
