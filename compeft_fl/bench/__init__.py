"""The benchmarks behind ``compeft-fl bench``: what a point of accuracy costs in bytes."""
