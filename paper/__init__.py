"""Tables and figures of the paper (arXiv 2407.19126), and any comparison of pruning methods under one protocol.

A client of secateur's public API: `python -m paper MODEL table1 --out DIR`.
"""
