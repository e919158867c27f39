"""Benchmarks: time and memory beside other libraries, growth, and the machine's own matrix-product
rate.
"""
