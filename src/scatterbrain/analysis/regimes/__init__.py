"""Where sparse attention, low-rank attention and both together are near to exact attention: ``scatterbrain analyze``.

config.py      options, and the methods of equal cost that they mean
inputs.py      queries and keys in clusters, or captured ones from a file
robust_pca.py  the best sparse + low-rank matrix that alternation finds: the oracle
measure.py     entropy and errors of one head at one temperature
table.py       rows, CSV, the summary
figure.py      the picture
runner.py      all of it, with progress and resumption
"""
