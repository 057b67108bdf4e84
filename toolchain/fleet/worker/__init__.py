"""The worker's process, ``python -m toolchain.fleet.worker SPEC.json``: token ids in, token ids out, one Triton behind.

``worker`` answers requests and watches the Triton, ``membership`` is its life in the endpoint. It knows nothing of
text, of other replicas, nor of who wants it.
"""
