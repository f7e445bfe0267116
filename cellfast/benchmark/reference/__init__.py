"""cellfast compared with the reference implementation (a user's checkout, driven as it is) or a plain PyTorch baseline: `measure.measure_reference`.

The reference's code is neither copied nor shipped: `adapter` drives a checkout in an environment of its own.
"""
