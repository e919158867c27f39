"""The ground floor: arguments, the machine's memory, numerics, progress. Nothing here knows of a
network.
"""
