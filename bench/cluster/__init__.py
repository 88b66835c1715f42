"""What the service does when many ask at once: real processes, real databases, and a bar for each figure.

Run as `python -m bench.cluster`. Where a figure is work done, it is counted in seconds of processor time, of
every process of the service, so that what else the machine does is left out.
"""
