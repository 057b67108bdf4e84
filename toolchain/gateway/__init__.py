"""The gateway: HTTP as OpenAI's and FEDML's clients speak it, in front of one or more Tritons.

    client -> app (doors) -> guard (keys, limits) -> bodies (what is asked) -> upstream (a Triton) -> answers

It speaks HTTP ``generate_stream`` to Triton's ``tensorrt_llm_bls``, because closing that connection cancels the
request, while cancelled gRPC streams leave models of Triton 2.51 that can never be unloaded. It does not know how a
server is started or what engine runs in it.
"""
