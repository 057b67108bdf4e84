"""A machine that runs replicas: its agent, each replica, its room, and whether its cloud is about to take it away.

It does what the board wants of it, and says on the board how that goes. It decides nothing, and does not know how
requests find its replicas.
"""
