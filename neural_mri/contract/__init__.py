"""What the processes, the clients and the files agree on: pure values, no I/O.

Everything here may import the standard library, msgspec and pyarrow, and nothing else.
"""
