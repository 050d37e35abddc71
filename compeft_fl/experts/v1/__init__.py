"""Messages and stubs of the experts' service, version 1, generated from ``proto/``: ``make proto``.

Nothing outside ``compeft_fl.experts`` uses these classes.
"""
