"""The policies to sample from: in this process (transformers, vLLM) or behind HTTP servers."""
