"""How a GPU computes local attention: with torch's flash kernels, and flex attention for everything else.

``choice`` takes the first way that can compute a call and warns once if a better one is missing.
"""
