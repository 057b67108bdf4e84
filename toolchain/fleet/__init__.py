"""Endpoints over several replicas, on NVIDIA Dynamo: a worker in front of each Triton, and the gateway's way to it.

Dynamo (ai-dynamo-runtime) discovers the workers, routes requests to the least loaded, and continues a request on
another worker when one is lost. It is imported inside functions alone, when an endpoint runs.
"""
