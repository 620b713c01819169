"""What a graphics card computes local attention with: torch's flash kernels, and flex attention for everything else.

``choice`` takes the first way that can compute a call and says once where a better one is missing.
"""
