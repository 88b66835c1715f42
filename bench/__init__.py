"""Measurements; nothing here is a test.

`python -m bench` says what a scan costs beside a plain forward, `python -m bench.latency` how long a person
waits for the running service. `make bench` prints both.
"""
