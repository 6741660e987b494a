"""The part of edgeattn that runs on the device, from inside a bundle: checks, builds, verifies and times it.

It needs Python 3.10, numpy, tensorrt and polygraphy, and nothing of edgeattn; a bundle carries it as `edgeattn_device`.
"""
