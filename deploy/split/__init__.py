"""Exporting a trained network as its two graphs, with proof that both together are the original."""

from edgeattn.deploy.split.splitting import RECORD, SplitRequest, split_network

__all__ = ["RECORD", "SplitRequest", "split_network"]
