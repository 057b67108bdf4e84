"""ScaleLLM: one YAML recipe becomes a running, measured LLM service on the GPU that one actually has."""

__version__ = "0.1.0"
