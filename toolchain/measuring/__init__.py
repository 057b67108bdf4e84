"""Measuring a running service: prompts, load, doors, statistics and the report that they end in.

``statistics`` and ``compare`` are pure. The doors alone talk to servers. Nothing here knows recipes or how a server was
started, and no number is made up: a request that failed is in the report with its reason.
"""
