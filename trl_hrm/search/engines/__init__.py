"""Engines that sample from a policy: in this process (transformers, vLLM) or on HTTP servers."""
