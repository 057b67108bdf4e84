"""What an endpoint owes to whom: an append-only, hash-chained ledger of GPU time, tokens, requests and money.

One SQLite file an endpoint. ``record`` says what a record is and how it is hashed, ``book`` keeps them, ``checking``
finds what was changed, ``totals`` adds up. It knows nothing of how the figures are measured: see ``fleet.front.meter``.
"""
