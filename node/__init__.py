"""The node: one process per machine that supervises llama.cpp and serves it to the mesh.

`node.daemon` is the composition root; nothing outside this package imports it.
"""
