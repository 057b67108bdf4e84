"""The controller as pure functions: what it sees, what the load wants, what fits where, what it costs, what to do.

Everything comes in as plain data, and a decision comes out (``decisions``). It knows no clock, no board, no thread,
and no other room.
"""
