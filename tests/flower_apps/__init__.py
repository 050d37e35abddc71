"""Small apps after Flower's public examples: each strategy and client as an app's author writes it.

None knows of compression: a test gives the ClientApp its mods, and the strategy its wrapper, which
are the two lines that a user changes. Data and models are small, and fixed by seeds.
"""
