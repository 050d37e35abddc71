"""Protobuf messages of the update format, version 1, generated from ``proto/`` by ``make proto``.

``proto/FORMAT.md`` specifies the bytes. Nothing outside ``compeft_fl.wire`` uses these classes.
"""
