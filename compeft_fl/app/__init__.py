"""The ready-made app: federated fine-tuning of adapters, configured by keys and without code.

``flwr run .`` in the repository and ``compeft-fl run`` start it. Nothing is imported here, so that
a client process pays only for what its message needs.
"""
