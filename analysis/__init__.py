"""Studies of the papers' own settings, on data that is at hand. `python -m analysis.run` redoes
them all.
"""
