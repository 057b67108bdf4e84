"""The package of the LLM API's parts."""
