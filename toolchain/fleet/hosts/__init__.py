"""Endpoints over many hosts: the head's servers and its door, how machines join there, and what they fetch.

It knows neither how many replicas there are nor what a request is. The certificates themselves are
``toolchain.fleet.trust``, since Dynamo's plane needs them too.
"""
