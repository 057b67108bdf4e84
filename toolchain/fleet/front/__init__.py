"""The gateway's side of an endpoint: text to ids and back, the way to the workers, who served what, what readers see.

It asks workers over Dynamo and counts what they give. Where replicas run, and how many, it does not decide: the head
steers it (``traffic``).
"""
