"""The OpenAI-compatible gateway: one local URL behind which the whole mesh stands.

`server.Gateway` listens and answers; `proxy` hands requests to the mesh; the other modules hold one
rule each. Response bytes are those of llama-server.
"""
