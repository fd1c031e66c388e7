"""What errors cost: curves of every module, probes at the output, prices."""
